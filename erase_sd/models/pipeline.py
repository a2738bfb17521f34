"""Load and sample text-to-image pipelines of diffusers, of any family that can be erased."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.files import new_folder
from erase_sd.common.memory import fitting
from erase_sd.common.rng import generator
from erase_sd.common.signals import StopFlag
from erase_sd.models import guidance
from erase_sd.models.checks import (
    check_folder,
    check_index,
    check_pipeline,
    check_place,
    check_single_file,
    check_text_encoder_files,
    check_weight_files,
    explained,
)
from erase_sd.models.families import Cond, family, resolution

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

LEFT_OUT: dict[str, dict[str, Any]] = {  # the safety checker paints images black, and what only serves it
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
}


def load(
    model: str,
    *,
    unet: str | None = None,
    transformer: str | None = None,
    dtype: torch.dtype | None = None,
    config: str | None = None,
) -> DiffusionPipeline:
    """Return a text-to-image pipeline of any of the families, on the CPU, checked and without a safety checker.

    `model` is a folder, a Hub id, or a single .safetensors file, whose layout `config` then names: a folder or Hub id
    of the same base model. `unet` or `transformer` replaces that network by a run's: a folder with unet/ (or the
    network's own folder), or a Hub id. `dtype` holds for every part, float32 by default. Raises UserError for a model
    that is missing, incomplete, damaged or of a kind that cannot be erased.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # loading has bars of its own for every part
    transformers.utils.logging.disable_progress_bar()
    dtype = dtype or torch.float32
    variant = None
    parts: dict[str, Any] = {}
    for part, source in (("unet", unet), ("transformer", transformer)):
        if source:
            parts[part] = load_network(source, part, dtype)
    layout = check_single_file(model, config) if Path(model).is_file() else model
    check_place(layout, "--model" if layout == model else "--model_config")
    with explained("--model", model):
        index = diffusers.DiffusionPipeline.load_config(layout)
        kind = check_index(index, layout)
        for name, value in index.items():
            if value == [None, None]:
                parts[name] = None
        parts |= LEFT_OUT.get(kind, {})
        cls = getattr(diffusers, kind)
        if layout != model:
            pipe = cls.from_single_file(model, config=layout, dtype=dtype, **parts)
        else:
            if Path(model).is_dir():
                variant = check_folder(Path(model), [name for name in family(kind).needed if name not in parts])
            pipe = cls.from_pretrained(model, dtype=dtype, variant=variant, **parts)
    check_pipeline(pipe, model)
    if Path(model).is_dir():
        check_text_encoder_files(pipe, Path(model), variant)
    return pipe


def load_network(source: str, part: str, dtype: torch.dtype) -> ModelMixin:
    """Return the network ("unet" or "transformer") of a run folder, of its own folder, or of a Hub repository.

    It carries the guidance that the run stored, if any. Raises UserError for a network that is missing, incomplete or
    damaged.
    """
    from diffusers import AutoModel

    check_place(source, f"--{part}")
    own_folder, variant = (Path(source) / "config.json").is_file(), None
    with explained(f"--{part}", source):
        if Path(source).is_dir():
            variant = check_weight_files(Path(source) if own_folder else Path(source) / part).variant
        subfolder = None if own_folder else part
        network = AutoModel.from_pretrained(source, subfolder=subfolder, dtype=dtype, variant=variant)
        if guided := guidance.load(source):
            guidance.attach(network, guided)
    return network


@torch.no_grad()
def encode(
    pipe: DiffusionPipeline,
    captions: list[str],
    guidance: float = 1.0,
    size: int | None = None,
    batch_size: int = 32,
) -> Cond:
    """Return what the network sees of N captions, as the pipeline itself gives it: tensors (N, ...), fp32, on the CPU.

    `guidance` and `size`, the side of the image in pixels, count where the network takes them as inputs.
    """
    side = size or resolution(pipe)
    chunks: dict[str, list[Tensor]] = {}
    for start in range(0, len(captions), batch_size):
        cond = family(pipe).encode(pipe, captions[start : start + batch_size], guidance, side)
        for name, x in cond.items():
            chunks.setdefault(name, []).append(x.float().cpu())
    encoded = {}
    for name, xs in chunks.items():
        encoded[name] = torch.cat(xs)
    return encoded


@torch.no_grad()
def encode_pictures(pipe: DiffusionPipeline, images: list[Image.Image], size: int | None = None) -> list[Tensor]:
    """Return latents (C, H, W) of RGB images, squeezed to `size` pixels a side, fp32, on the CPU, as `sample` does.

    The mode of the code stands for it, so that an image has one latent.
    """
    side, vae = size or resolution(pipe), pipe.vae
    found = []
    for image in images:
        pixels = pipe.image_processor.preprocess(image, height=side, width=side).to(vae.device, vae.dtype)
        z = vae.encode(pixels).latent_dist.mode().float().cpu()[0]
        found.append((z - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor)
    return found


def sample(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 32,
    size: int | None = None,
    output_type: str = "pil",
    description: str | None = None,
) -> list[Image.Image] | list[Tensor]:
    """Return one image per prompt and seed, the same whatever the batch size and order; `pipe` is left as it was.

    A batch that runs out of memory is sampled again, half as many images at a time; UserError where not one fits.
    `size`, in pixels, is by default the model's. `output_type` is "pil", or "latent" for tensors (C, H, W), float32,
    on the CPU. With a `description` the first process shows a bar. SystemExit after the batch in which a signal came.
    """
    quiet = _working_copy(pipe)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
    hidden = description is None or os.environ.get("RANK", "0") != "0"
    images: list[Any] = []

    def some() -> Any:
        start = len(images)
        generators = [generator(seed, "image") for seed in seeds[start : start + batch_size]]
        return sample_batch(
            quiet,
            prompts[start : start + batch_size],
            generators,
            steps=steps,
            guidance=guidance,
            size=(size, size),
            output_type=output_type,
        )

    def smaller() -> bool:
        nonlocal batch_size
        if batch_size == 1:
            raise UserError("not one image at a time can be sampled in this memory: give a smaller --resolution")
        batch_size = -(-min(batch_size, len(prompts)) // 2)
        return True

    with StopFlag() as stop, tqdm(total=len(prompts), desc=description, unit="image", disable=hidden) as bar:
        while len(images) < len(prompts):
            batch = fitting(some, smaller)
            if output_type == "latent":
                batch = list(family(pipe).unpacked(batch).float().cpu())
            images += batch
            bar.update(len(batch))
            stop.leave()
    return images


def sample_batch(
    pipe: DiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    *,
    steps: int,
    guidance: float,
    size: tuple[int | None, int | None] = (None, None),
    output_type: str = "pil",
) -> Any:
    """Sample one batch of any text-to-image pipeline, each image from its own generator; `size` is (width, height).

    Returns what the pipeline makes of `output_type`: PIL images, or an array (n, height, width, 3) in [0, 1] for "np".
    """
    return pipe(
        prompt=prompts,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type=output_type,
    ).images


def _working_copy(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline of the same modules with a scheduler of its own, no inner bar, and no safety checker.

    The checker paints images black, which every later score would take for erasure.
    """
    quiet = copy.copy(pipe)
    quiet.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if "safety_checker" in pipe.components:
        quiet.safety_checker = None
        quiet.register_to_config(requires_safety_checker=False)
    quiet._all_hooks = []  # each call would put the hooks of model offload back
    quiet.set_progress_bar_config(disable=True)
    return quiet


def save_network(network: ModelMixin, folder: str | Path, part: str, dtype: torch.dtype | None = None) -> Path:
    """Write `network` to folder/part, whole or not at all, for `from_pretrained(folder, subfolder=part)`.

    `dtype` is that of the file, by default the model's own. Raises FloatingPointError, with nothing written, if a
    weight is not finite in that dtype. `network` itself is not changed.
    """
    weights = {}
    for name, tensor in network.state_dict().items():
        weights[name] = tensor.detach().to("cpu", dtype)
        if not torch.isfinite(weights[name]).all():
            raise FloatingPointError(f"{part} weight {name} has NaN or infinite values: nothing was saved")
    target = Path(folder) / part
    with torch.device("meta"):
        blank = type(network).from_config(network.config)
    blank.load_state_dict(weights, assign=True)
    with new_folder(target) as temporary:
        blank.save_pretrained(str(temporary))
        _scrub(Path(temporary) / blank.config_name)
    return target


def _scrub(config: Path) -> None:
    """Drop the path the model was loaded from: it names the user's own folders."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
