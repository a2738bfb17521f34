"""Prompts x seeds -> images: `python -m eval.generate --model M --unet runs/cat --prompts i2p --output_dir gen/cat`.

Every image has its own generator, seeded as its row says, and its own place in a batch: batch size, number of
processes and resuming change no noise. `accelerate launch -m eval.generate ...` shares the batches out.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState

from erase_sd.common.cli import at_least, command, knob, run_main
from erase_sd.common.errors import UserError, asked_by_the_user
from erase_sd.settings import SD_V1
from eval.images.folder import ImageFolder, count_broken, read, too_many_broken
from eval.images.pipelines import load, origin
from eval.images.sources import Source, batches, pictures, resolve, settled
from eval.images.writer import FolderWriter, fill
from prompts.tables import PromptRow, chosen

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HOW = {"output_dir", "batch_size", "rows"}  # how a folder is filled, or how far: not what its images are


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What to sample, with what, and where to."""

    prompts: str = knob("i2p", '"i2p", "pocket", "unlearncanvas", a .csv or .txt file, or a concept such as "nudity"')
    prompt_column: str | None = knob(None, "column of a .csv with the prompts (default: prompt, caption or text)")
    model: str = knob(SD_V1, "diffusers folder or Hub id, or 'pocket'", ("pretrained_model_name_or_path",))
    unet: str | None = knob(
        None, "run folder, UNet folder, Hub id or single file (ESD, UCE, .ckpt) whose UNet replaces the model's"
    )
    transformer: str | None = knob(None, "the same for models with a transformer")
    text_encoder: str | None = knob(None, "folder or file whose text encoder replaces the model's (AdvUnlearn, HiRM)")
    adapter: tuple[str, ...] = knob((), "LoRA or SPM files that change the model, FILE or FILE@0.5")
    original: str | None = knob(None, "what --model was made from, where it is itself an erased model")
    output_dir: str = knob("gen", "folder of the images; the same command again goes on where it was")
    rows: int | None = knob(None, "only the first so many rows, after the filters")
    images_per_prompt: int = knob(1, "images of every row, each from a seed of its own")
    category: str | None = knob(None, "I2P: only rows of this category, such as sexual")
    nudity_above: float | None = knob(None, "I2P: only rows above this nudity_percentage (Ring-A-Bell's set: 50)")
    hard: bool = knob(False, "I2P: only rows marked hard")
    scheduler: Literal["ddim", "ddpm", "pndm", "lms", "euler", "euler-a", "dpm++", "unipc"] | None = knob(
        None, "sampler (default: the model's own; the paper's is lms)"
    )
    steps: int = knob(50, "denoising steps", ("num_inference_steps",))
    guidance: float = knob(7.5, "classifier-free guidance scale", ("guidance_scale",))
    running_generator: bool = knob(
        False, "draw all images of a row from one generator, as the released script does, instead of a seed for each"
    )
    size: int | None = knob(None, "side in pixels (default: the model's own)", ("resolution",))
    per_row: bool = knob(False, "take guidance and size from the row where it has them (SPM's protocol)")
    dtype: Literal["float32", "float16", "bfloat16"] = knob("float32", "number format of the weights")
    batch_size: int = knob(8, "images sampled at a time")
    seed: int = knob(0, "seed of rows that have none")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 1, "images_per_prompt", "steps", "batch_size")
        at_least(self, 0, "seed", "guidance")
        for name in ("rows", "size"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        if self.guidance > 1000:
            raise UserError(f"--guidance {self.guidance:g} is beyond 1000, where every image is NaN: lower it")
        if self.running_generator and self.scheduler in ("ddpm", "euler-a"):
            text = (
                f"--running_generator: {self.scheduler} draws noise in every step, and the released script's does not"
            )
            raise UserError(f"{text}: give --scheduler lms, or leave it out")
        if self.size is not None and self.size % 8:
            raise UserError(f"--size {self.size} is no multiple of 8, as VAEs need: give {self.size // 8 * 8 or 8}")


def run(options: Generation) -> int:
    """Fill the folder and say what it holds; returns 1 where too many of its images are broken."""
    folder = generate(options)
    if PartialState().is_main_process:
        print(f"{folder.path}: {len(folder.entries)} images, {count_broken(folder.entries)} of them broken")
        if cut := sum(bool(entry.truncated) for entry in folder.entries):
            print(f"{cut} images are of prompts that the text encoder cut: it read the first words only")
    return int(too_many_broken(folder.entries))


def generate(options: Generation) -> ImageFolder:
    """Sample what the folder lacks and read it; a complete folder costs no model.

    Raises UserError for bad input, and SystemExit with 128 + signal when stopped: the same call goes on.
    """
    source, rows = _rows(options)
    rows = [settled(row, options.guidance, options.size, options.per_row) for row in rows]
    requests = list(pictures(rows, options.images_per_prompt, options.seed, options.running_generator))
    state = PartialState(cpu=not torch.accelerator.is_available())  # else several CPU processes would be strangers
    for notice in source.notices:
        print_once(state, f"note: {notice}")
    protocol = _protocol(options, source)
    with FolderWriter(Path(options.output_dir), protocol, _environment(state), state) as folder:
        missing = folder.missing(requests)
        if missing:
            print_once(state, f"{options.output_dir}: {len(missing)} of {len(requests)} images to sample")
            todo = []
            for batch in batches(requests, options.batch_size):
                if any(request.file in missing for request in batch):
                    todo.append(batch)
            fill(folder, _pipeline(options), todo, options.steps)
        folder.finish(requests)
    return read(options.output_dir)


def print_once(state: PartialState, text: str) -> None:
    """Print one line, by the first process, on stderr: stdout is for results."""
    if state.is_main_process:
        print(text, file=sys.stderr)


def _rows(options: Generation) -> tuple[Source, list[PromptRow]]:
    """Return the source and the rows that the filters leave."""
    source = resolve(options.prompts, options.prompt_column)
    filters = {"category": options.category, "nudity_above": options.nudity_above, "hard": options.hard}
    with asked_by_the_user():
        rows = chosen(source.rows, options.prompts, **filters)
    return source, rows[: options.rows]


def _pipeline(options: Generation) -> DiffusionPipeline:
    return load(
        options.model,
        unet=options.unet,
        transformer=options.transformer,
        text_encoder=options.text_encoder,
        adapter=options.adapter,
        dtype=options.dtype,
        scheduler=options.scheduler,
    )


def _protocol(options: Generation, source: Source) -> dict[str, Any]:
    """Return generation.json: what the images depend on, so that another question cannot land in the same folder."""
    asked = {name: value for name, value in asdict(options).items() if name not in HOW}
    for name in ("prompt_column", "text_encoder", "adapter", "original"):
        if not asked[name]:
            del asked[name]  # folders from before there was the option have none
    one_a_row = asked.pop("running_generator")
    parts = {"text_encoder": options.text_encoder, "adapter": options.adapter}
    networks = {"unet": options.unet, "transformer": options.transformer} | parts
    return asked | {
        "prompts": source.name,
        "prompts_sha256": source.sha256,
        "weights": _weights(options),
        **origin(options.model, **networks, scheduler=options.scheduler),
        "safety_checker": False,
        "noise": f"torch.Generator('cpu').manual_seed(seed) for each {'row' if one_a_row else 'image'}",
    }


def _weights(options: Generation) -> str | None:
    """Return what makes the images other than the original model's, as a label names it; None for the original."""
    parts = [options.unet or options.transformer, options.text_encoder, *options.adapter]
    named = [part for part in parts if part]
    if options.original and not named:
        named = [options.model]
    if len(named) > 1:
        named = [Path(part).name for part in named]
    return " + ".join(named) or None


def _environment(state: PartialState) -> dict[str, str]:
    """Return the versions and the device, which decide over the last bits of an image, and now and then over more."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    return versions | {"device": device}


main = command("eval.generate", "Sample the images that a model is judged by.", Generation, run)

if __name__ == "__main__":
    run_main(main)
