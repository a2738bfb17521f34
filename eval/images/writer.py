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
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from erase_sd.common.files import RunLock, claim, file_digest, write_atomic
from erase_sd.common.imaging import broken
from erase_sd.common.signals import StopFlag
from erase_sd.models.pipeline import sample_batch
from eval.images.folder import GENERATION, MANIFEST, Entry, entries_of
from eval.images.pipelines import load
from eval.images.sources import ImageRequest

if TYPE_CHECKING:
    from eval.generate import Generation

PARTS = ".parts"  # what each process has finished; becomes the manifest when all is done


class Folder:
    """The images that one protocol asks for. Use in a `with` block, by all processes alike."""

    def __init__(self, path: Path, protocol: dict[str, Any], state: PartialState) -> None:
        self.path, self.protocol, self.state = path, json.loads(json.dumps(protocol)), state
        self.part = path / PARTS / f"{state.process_index}.jsonl"

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        claim(self.path, GENERATION, self.protocol)
        self.state.wait_for_everyone()  # nobody shall take another's first file for a stranger's
        if self.state.is_main_process:
            self._stack.enter_context(RunLock(self.path))
            write_atomic(self.path / GENERATION, json.dumps(self.protocol, indent=2) + "\n")
        if self.part.is_file():  # a kill may have cut its last line, and the next one would be glued to it
            write_atomic(self.part, "".join(map(_line, _lines(self.part))))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def done(self) -> dict[str, Entry]:
        """Every finished image by its file's name: a line that says so, and a file that it still describes."""
        lists = [self.path / MANIFEST, *sorted((self.path / PARTS).glob("*.jsonl"))]
        found = {e.file: e for file in lists if file.is_file() for e in _lines(file)}
        return {name: e for name, e in found.items() if _is_whole(self.path / name, e.sha256)}

    def missing(self, jobs: list[ImageRequest]) -> set[str]:
        """The names of the images that are not finished."""
        done = self.done()
        self.state.wait_for_everyone()  # all look before the first one draws: they share the same batches out
        return {job.file for job in jobs} - done.keys()

    def keep(self, job: ImageRequest, image: Image.Image, why_broken: str | None) -> None:
        """Write one image and then the line that vouches for it."""
        data = io.BytesIO()
        image.save(data, "png")
        write_atomic(self.path / job.file, data.getvalue())
        entry = _entry(job, image, why_broken, sha256(data.getvalue()).hexdigest())
        self.part.parent.mkdir(exist_ok=True)
        with open(self.part, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, jobs: list[ImageRequest]) -> None:
        """Write the manifest, in the order of the prompts, once every process is through."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            done = self.done()
            write_atomic(self.path / MANIFEST, "".join(_line(done[job.file]) for job in jobs))
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        self.state.wait_for_everyone()


def fill(folder: Folder, options: Generation, todo: list[list[ImageRequest]]) -> None:
    """Draw this process's share of the batches. Exits with 128 + signal when stopped, after the batch at hand."""
    mine = todo[folder.state.process_index :: folder.state.num_processes]
    network = {"unet": options.unet, "transformer": options.transformer}
    pipe = load(options.model, **network, dtype=options.dtype, scheduler=options.scheduler).to(folder.state.device)
    done = folder.done()
    with (
        StopFlag() as stop,
        tqdm(total=sum(map(len, mine)), unit="image", disable=not folder.state.is_local_main_process) as bar,
    ):
        for batch in mine:
            for job, (image, why) in zip(batch, _draw(pipe, batch, options.steps), strict=True):
                if job.file not in done:  # an image of a batch that was cut short: the others are drawn for its sake
                    folder.keep(job, image, why)
            bar.update(len(batch))
            if stop.is_set():
                raise SystemExit(128 + stop.signum)


def _draw(pipe: DiffusionPipeline, batch: list[ImageRequest], steps: int) -> list[tuple[Image.Image, str | None]]:
    """The images of a batch, each with why it is none: NaN is told from black, which it would be saved as."""
    row = batch[0].row  # guidance and size are alike in a batch
    pixels = sample_batch(
        pipe,
        [job.row.prompt for job in batch],
        [torch.Generator("cpu").manual_seed(job.seed) for job in batch],
        steps=steps,
        guidance=row.guidance,
        size=(row.width, row.height),
        output_type="np",
    )
    finite = [bool(np.isfinite(x).all()) for x in pixels]
    images = [Image.fromarray((np.nan_to_num(x) * 255).round().astype("uint8")) for x in pixels]
    return [(image, broken(image) if sound else "nan") for image, sound in zip(images, finite, strict=True)]


def _entry(job: ImageRequest, image: Image.Image, why_broken: str | None, digest: str) -> Entry:
    return Entry(
        file=job.file,
        row=job.row.row,
        prompt=job.row.prompt,
        seed=job.seed,
        guidance=job.row.guidance,
        width=image.width,
        height=image.height,
        tags=job.row.tags,
        broken=why_broken,
        sha256=digest,
    )


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _lines(file: Path) -> list[Entry]:
    """The entries of a manifest, or of a process's part, whose last line a kill may have cut: that image is redone."""
    if file.name == MANIFEST:
        return entries_of(file)
    return [Entry(**json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _is_whole(file: Path, digest: str | None) -> bool:
    return file.is_file() and file_digest(file) == digest
