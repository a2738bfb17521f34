"""What every export has in common: the erased model, the options, and the description of a format."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.common.files import follow_umask, naming

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erase_sd.models.guidance import SafetyGuidance

Weights = dict[str, Tensor]  # a state dict

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How the files are written."""

    dtype: tuple[Literal["fp32", "fp16"], ...] = knob(
        ("fp32",), "type of the weights; a pipeline folder takes both, fp16 as its variant"
    )
    max_shard_size: str = knob("10GB", "pipeline and hub: weights of one component beyond this size become shards")
    rank: tuple[int, ...] = knob((64,), "lora: one adapter per rank")
    min_energy: float = knob(0.9, "lora: share of the squared change that an adapter has to keep, in [0, 1]")
    partial: bool = knob(False, "lora: write an adapter that keeps less than --min_energy, marked as partial")
    repo: str | None = knob(None, "hub: repository to push to, owner/name")
    public: bool = knob(False, "hub: a repository that everybody sees")

    def __post_init__(self) -> None:
        """Raise UserError for values outside their range."""
        if len(set(self.dtype)) != len(self.dtype):
            raise UserError(f"--dtype {' '.join(self.dtype)} names one type twice: name each once")
        for rank in self.rank:
            if rank < 1:
                raise UserError(f"--rank {rank} is no rank: give whole numbers of at least 1")
        if len(set(self.rank)) != len(self.rank):
            raise UserError(f"--rank {' '.join(map(str, self.rank))} names one rank twice: name each once")
        if not 0 <= self.min_energy <= 1:
            raise UserError(f"--min_energy {self.min_energy} is no share: give a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Erased:
    """An erased model, loaded: what the formats write."""

    pipe: DiffusionPipeline  # with the erased network in it, float32, on the CPU
    part: str  # the component that was erased: "unet" or "transformer"
    name: str  # of the concept, for file names
    original: nn.Module | None = None  # the base's network, for formats that compare the two
    guidance: SafetyGuidance | None = None  # what the run stores beside its network
    folder: Path | None = None  # of the run
    base: str = ""  # the base model as the user named it
    concepts: tuple[str, ...] = ()  # as the user named them
    facts: dict[str, str] = field(default_factory=dict)  # what the metadata of a file says about the run
    judge: Callable[[DiffusionPipeline], dict] | None = None  # scores of a pipeline, as in scores.json

    @property
    def network(self) -> nn.Module:
        """Return the erased network."""
        return getattr(self.pipe, self.part)

    def metadata(self, **more: str) -> dict[str, str]:
        """Return the metadata of a .safetensors file: strings, and "format", without which transformers refuses it."""
        return {"format": "pt"} | {f"erase_sd.{name}": value for name, value in (self.facts | more).items()}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: the function that writes it, and what it takes."""

    write: Callable[[Erased, Path, ExportSettings], list[str]]  # returns what was written and how to load it
    suffixes: tuple[str, ...] = ()  # of its file; a folder has none
    dtypes: tuple[str, ...] = ("fp32", "fp16")
    several_dtypes: bool = False
    networks: tuple[str, ...] = ("unet", "transformer")
    compares: bool = False  # needs the base's network as well
    guidance: bool = False  # can hold the guidance that a run stores beside its network
    local: bool = True  # leaves files on this machine
    check: Callable[[Path, ExportSettings], None] | None = None  # UserError for what would fail after the loading


def with_network(pipe: DiffusionPipeline, part: str, network: nn.Module) -> DiffusionPipeline:
    """Return a pipeline of the same components with another network; `pipe` is left as it was."""
    swapped = copy.copy(pipe)
    swapped.register_modules(**{part: network})
    return swapped


def cast(tensors: Weights, dtype: torch.dtype | None, what: str) -> Weights:
    """Return the tensors on the CPU and contiguous, floating-point ones in `dtype`; shared memory stays shared.

    None leaves the types alone. Raises UserError for values that are not finite in `dtype`: fp16 ends at 65504.
    """
    done: dict[tuple, Tensor] = {}
    result = {}
    for name, x in tensors.items():
        place = (x.data_ptr(), x.shape, x.stride())
        if place not in done:
            done[place] = x.detach().to("cpu", dtype if x.is_floating_point() else None).contiguous()
            if not torch.isfinite(done[place]).all():
                raise UserError(f"{what} {name} is not finite in {dtype or x.dtype}: give --dtype fp32 or another run")
        result[name] = done[place]
    return result


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, of its suffix, that becomes `path` if the block succeeds and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with naming(path):
            yield temporary
        follow_umask(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(rows: list[tuple[Any, ...]]) -> list[str]:
    """Return rows of words as aligned lines."""
    words = [[str(word) for word in row] for row in rows]
    widths = [max(len(row[i]) for row in words) for i in range(len(words[0]))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in words]
