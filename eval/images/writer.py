"""Filling a folder of images: which are missing, one batch at a time, every finished image kept whatever happens."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, claim, file_digest, write_atomic
from erase_sd.common.imaging import broken
from erase_sd.common.signals import StopFlag
from erase_sd.models.pipeline import sample_batch
from eval.images.folder import GENERATION, LATER, MANIFEST, Entry, entries_of
from eval.images.sources import ImageRequest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTS = ".parts"  # what each process has finished; becomes the manifest when all is done


class FolderWriter:
    """A folder that receives the images of one protocol. Use it in a `with` block, by all processes alike.

    The number of images a prompt may grow or shrink: it changes none of them.
    generation.json holds the protocol and, as "environment", versions and device. Another protocol is refused at once;
    another environment only where images are missing, for a finished folder is what it is.
    """

    def __init__(self, path: Path, protocol: dict[str, Any], environment: dict[str, str], state: PartialState) -> None:
        self.path = path
        self.protocol = json.loads(json.dumps(protocol))
        self.environment = environment
        self.state = state
        self.part = path / PARTS / f"{state.process_index}.jsonl"

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        claim(self.path, GENERATION, self.protocol | self._recorded())
        self.state.wait_for_everyone()  # nobody shall take another's first file for a stranger's
        if self.state.is_main_process:
            self._stack.enter_context(RunLock(self.path))
        if self.part.is_file():  # a kill may have cut its last line, and the next one would be glued to it
            write_atomic(self.part, "".join(map(_line, _lines(self.part))))
        return self

    def _recorded(self) -> dict[str, Any]:
        """Return what of generation.json may differ from what is asked for now; {} if there is none."""
        file = self.path / GENERATION
        if not file.is_file():
            return {}
        try:
            stored = dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError:
            return {}  # `claim` says what is wrong with it
        return {name: stored[name] for name in ("environment", "images_per_prompt") if name in stored}

    def begin(self) -> None:
        """Write generation.json, before the first image. Raises UserError where it is of another environment."""
        found = self._recorded().get("environment", self.environment)
        for name, value in self.environment.items():
            if found.get(name) != value:
                text = f"--output_dir {self.path} was begun with {name} {found.get(name)} and would go on with {value}"
                raise UserError(f"{text}, which samples other images: name another folder")
        self.state.wait_for_everyone()  # all have read the file before it is written
        if self.state.is_main_process:
            text = json.dumps(self.protocol | {"environment": self.environment}, indent=2)
            write_atomic(self.path / GENERATION, text + "\n")

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def done(self) -> dict[str, Entry]:
        """Return every finished image by its file's name: one that a line lists and whose file that line describes."""
        found: dict[str, Entry] = {}
        for file in [self.path / MANIFEST, *sorted((self.path / PARTS).glob("*.jsonl"))]:
            if file.is_file():
                for entry in _lines(file):
                    found[entry.file] = entry
        return {name: entry for name, entry in found.items() if _is_whole(self.path / name, entry.sha256)}

    def missing(self, requests: list[ImageRequest]) -> set[str]:
        """Return the file names of the images that are not finished."""
        done = self.done()
        self.state.wait_for_everyone()  # all look before the first one samples: they share the same batches out
        return {request.file for request in requests} - done.keys()

    def keep(self, request: ImageRequest, image: Image.Image, why_broken: str | None, tokens: dict[str, Any]) -> None:
        """Write one image and then the line that vouches for it, which says how long its prompt is."""
        data = io.BytesIO()
        image.save(data, "png")
        write_atomic(self.path / request.file, data.getvalue())
        entry = _entry(request, image, why_broken, sha256(data.getvalue()).hexdigest(), tokens)
        self.part.parent.mkdir(exist_ok=True)
        with open(self.part, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, requests: list[ImageRequest]) -> None:
        """Write the manifest, in the order of the prompts, once every process is through."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            done = self.done()
            write_atomic(self.path / MANIFEST, "".join(_line(done[request.file]) for request in requests))
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        self.state.wait_for_everyone()


def fill(folder: FolderWriter, pipe: DiffusionPipeline, batches: list[list[ImageRequest]], steps: int) -> None:
    """Sample this process's share of the batches in `steps` denoising steps and keep what the folder lacks of them.

    Raises SystemExit with 128 + signal when stopped, after the batch at hand.
    """
    share = batches[folder.state.process_index :: folder.state.num_processes]
    folder.begin()
    pipe = pipe.to(folder.state.device)
    done = folder.done()
    total = sum(map(len, share))
    with StopFlag() as stop, tqdm(total=total, unit="image", disable=not folder.state.is_local_main_process) as bar:
        for batch in share:
            for request, (image, why_broken) in zip(batch, _sample(pipe, batch, steps), strict=True):
                if request.file not in done:  # a batch that was cut short is sampled whole for the rest's sake
                    folder.keep(request, image, why_broken, _tokens(pipe, request.row.prompt))
            bar.update(len(batch))
            if stop.is_set():
                raise SystemExit(128 + stop.signum)


def _sample(pipe: DiffusionPipeline, batch: list[ImageRequest], steps: int) -> list[tuple[Image.Image, str | None]]:
    """Return the images of a batch, each with why it is none: NaN is told from black, which it would be saved as."""
    row = batch[0].row  # guidance and size are alike in a batch
    pixels = sample_batch(
        pipe,
        [request.row.prompt for request in batch],
        [_generator(pipe, request) for request in batch],
        steps=steps,
        guidance=row.guidance,
        size=(row.width, row.height),
        output_type="np",
    )
    images = []
    for array in pixels:
        image = Image.fromarray((np.nan_to_num(array) * 255).round().astype("uint8"))
        images.append((image, broken(image) if np.isfinite(array).all() else "nan"))
    return images


def _generator(pipe: DiffusionPipeline, request: ImageRequest) -> torch.Generator:
    """Return the generator of an image's noise, past the noise of the images before it.

    Raises UserError for models without a UNet, whose latents have other shapes.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    if not request.after:
        return generator
    if "unet" not in pipe.components:
        raise UserError("--running_generator is for models with a UNet: leave it out")
    native = pipe.unet.config.sample_size
    high, wide = (
        side // pipe.vae_scale_factor if side else native for side in (request.row.height, request.row.width)
    )
    shape = (1, pipe.unet.config.in_channels, high, wide)
    for _ in range(request.after):
        torch.randn(shape, generator=generator, dtype=pipe.unet.dtype)
    return generator


def _tokens(pipe: DiffusionPipeline, prompt: str) -> dict[str, Any]:
    """Return {"tokens", "truncated"} of a prompt by the tokenizer that takes the longest ones; {} without any."""
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    if not tokenizers:
        return {}
    longest = max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)
    tokens = len(longest(prompt, truncation=False, verbose=False).input_ids)
    return {"tokens": tokens, "truncated": tokens > longest.model_max_length}


def _entry(
    request: ImageRequest, image: Image.Image, why_broken: str | None, digest: str, tokens: dict[str, Any]
) -> Entry:
    return Entry(
        file=request.file,
        row=request.row.row,
        prompt=request.row.prompt,
        seed=request.seed,
        guidance=request.row.guidance,
        width=image.width,
        height=image.height,
        tags=request.row.tags,
        broken=why_broken,
        sha256=digest,
        after=request.after,
        **tokens,
    )


def _line(entry: Entry) -> str:
    """Return one line of the manifest; what came later is left out where it says nothing."""
    fields = asdict(entry)
    for name in LATER:
        if not fields[name]:
            del fields[name]
    return json.dumps(fields) + "\n"


def _lines(file: Path) -> list[Entry]:
    """The entries of a manifest, or of a process's part, whose last line a kill may have cut: that image is redone."""
    if file.name == MANIFEST:
        return entries_of(file)
    return [Entry(**json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _is_whole(file: Path, digest: str | None) -> bool:
    return file.is_file() and file_digest(file) == digest
