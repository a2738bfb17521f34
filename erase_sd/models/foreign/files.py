"""Bytes -> named tensors, executing nothing: .safetensors, and what torch.save wrote, with weights_only."""

from __future__ import annotations

import pickle
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erase_sd.common.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
LFS_POINTER = b"version https://git-lfs"
WRAPPERS = ("state_dict", "model", "unet", "module", "model_state_dict", "text_encoder", "params")
EMA_WRAPPERS = ("ema", "unet_ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema")


class ForeignWeights(NamedTuple):
    """Tensors by the names of their file, and what its header says."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    averaged: bool = False  # they were taken from a dictionary of averaged weights


class Applied(NamedTuple):
    """What was put into a pipeline, in one line, and the components that it changed."""

    line: str
    parts: frozenset[str]


def located(source: str, option: str) -> tuple[Path, str]:
    """Return the place of a source and what stands behind its last "@": "ema", an adapter's strength, or "".

    Raises UserError for a place that does not exist.
    """
    if Path(source).exists():
        return Path(source), ""
    place, _, tail = source.rpartition("@")
    if place and Path(place).exists():
        return Path(place), tail
    raise UserError(f"{option} {source} does not exist: give an existing file or folder")


def weights_of(path: Path, option: str) -> list[Path]:
    """Return the weight files of a source: itself, or those of a folder without its variants.

    Raises UserError for a folder without weights, or with several files that are no shards of one.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{option} {path} is no weight file: give one of {', '.join(SUFFIXES)}")
        return [path]
    for suffix in SUFFIXES:
        files = [file for file in sorted(path.glob(f"*{suffix}")) if "." not in file.stem]  # a.fp16.x is a variant
        shards = [file for file in files if "-of-" in file.stem]
        if shards or len(files) == 1:
            return shards or files
        if files:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{option} {path} holds {names}: name one of these files")
    raise UserError(f"{option} {path} holds no weight file ({', '.join(SUFFIXES)}): name the file itself")


def read(path: Path, option: str, *, ema: bool = False) -> ForeignWeights:
    """Return all tensors of a source, those of a checkpoint's dictionary of dictionaries taken out of it.

    `ema` takes the averaged copy where the dictionary keeps one apart. Raises UserError for a file that is damaged, a
    git-LFS pointer, or holds objects instead of tensors.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    averaged = False
    for file in weights_of(path, option):
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{option} {file} is a git-LFS pointer, not the file itself: run git lfs pull")
        if file.suffix == ".safetensors":
            found, header = _safetensors(file, option)
            metadata |= header
        else:
            found, averaged = _unwrapped(_pickled(file, option), file, option, ema)
        tensors |= found
    if not tensors:
        raise UserError(f"{option} {path} holds no tensor: give a file of weights")
    return ForeignWeights(tensors, metadata, averaged)


def _safetensors(file: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                tensors[name] = opened.get_tensor(name)
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{option} {file} is damaged or incomplete ({error}): copy or download it again") from error


def _pickled(file: Path, option: str) -> Any:
    """Return what torch.save wrote, of plain containers and tensors. Raises UserError for any other object."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = shorten(str(error).partition("GLOBAL ")[2].partition(" was")[0] or "objects of some library", 80)
        raise UserError(
            f"{option} {file} holds more than tensors ({reason}), which reading would execute: save its state dict "
            "alone, or as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = shorten(str(error), 120, placeholder=" ...")
        raise UserError(f"{option} {file} is damaged or incomplete ({reason}): copy or download it again") from error


def _unwrapped(stored: Any, file: Path, option: str, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the state dict in what was stored, itself or a known entry, and whether that entry is an average's."""
    if not isinstance(stored, dict):
        raise UserError(f"{option} {file} holds a {type(stored).__name__} and no state dict: save one")
    for name in (*(EMA_WRAPPERS if ema else ()), *WRAPPERS):
        if isinstance(stored.get(name), dict):
            tensors, averaged = _unwrapped(stored[name], file, option, ema)
            return tensors, averaged or name in EMA_WRAPPERS
    tensors = {}
    for name, value in stored.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
    if not tensors:
        names = ", ".join(map(str, list(stored)[:5]))
        raise UserError(f"{option} {file} holds {names or 'nothing'} and no state dict: save one")
    return tensors, False


def described(weights: dict[str, Tensor], names: list[str]) -> str:
    """Return the first three of some tensors with their shapes, as one phrase."""
    words = [f"{name} {tuple(weights[name].shape)}" for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(words) + more


def fill(part: nn.Module, weights: dict[str, Tensor], names: dict[str, str], said: str) -> int:
    """Copy tensors into a module; returns how many of its own it had. `names` maps the module's name to the file's.

    A matrix stands for a 1 x 1 convolution and the other way round. Raises UserError, with `said` in front and nothing
    copied, where shapes differ.
    """
    state = part.state_dict()
    wrong = []
    for own, theirs in names.items():
        if _squeezed(state[own].shape) != _squeezed(weights[theirs].shape):
            wrong.append(own)
    if wrong:
        raise UserError(
            f"{said}: {len(wrong)} of its tensors have other shapes than the base's: "
            f"{described(weights, [names[own] for own in wrong])} where the base has "
            f"{described(state, wrong[:1])}; give the base that it was made from"
        )
    with torch.no_grad():
        for own, theirs in names.items():
            state[own].copy_(weights[theirs].reshape(state[own].shape))
    return len(state)


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape without the window of a 1 x 1 convolution."""
    return tuple(shape[:2]) if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)
