"""The difference between the base's network and the erased one, exact to the bit, with a way back.

A tensor's entry is bits(base) XOR bits(erased), of which the same operation makes either from the other: apply and
undo need nothing else. Where few entries differ their places and bits are stored, elsewhere all bits, whichever is
smaller. The header holds the SHA-256 of the network before and after, so that a delta refuses any other one.

    <name>.bits                 integers as wide as the weights: all of them, or those at .places
    <name>.places               flat indices, of a sparse tensor only
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.exports.base import Erased, ExportSettings, Weights, new_file

KIND = "delta 1"
BITS, PLACES = ".bits", ".places"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Delta(NamedTuple):
    """A delta as read from its file."""

    path: Path
    part: str  # "unet" or "transformer"
    base: str  # SHA-256 of the network that it applies to
    erased: str  # and of what comes out
    tensors: Weights


def write_delta(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Write the delta of a run to the file `output`. Raises UserError if the two networks are the same."""
    base, after = erased.original.state_dict(), erased.network.state_dict()
    tensors = difference(base, after)
    if not tensors:
        raise UserError(f"the {erased.part} of {erased.name} is the base's to the bit: there is nothing to write")
    hashes = {"base_sha256": fingerprint(base), "erased_sha256": fingerprint(after)}
    with new_file(output) as temporary:
        save_file(tensors, temporary, erased.metadata(kind=KIND, part=erased.part, **hashes))
    sparse = sum(name.endswith(PLACES) for name in tensors)
    dense = sum(name.endswith(BITS) for name in tensors) - sparse
    size = output.stat().st_size / 2**20
    return [
        f"{output}: {sparse} sparse and {dense} dense of {len(after)} tensors, {size:.1f} MiB",
        "",
        f"python -m erase_sd.export --apply {output} --model BASE --output ERASED",
        f"python -m erase_sd.export --restore {output} --model ERASED --output BASE",
    ]


def difference(base: Weights, after: Weights) -> Weights:
    """Return the entries of every tensor that differs in a bit. Raises UserError for networks that do not correspond.

    A place costs 4 bytes (8 in tensors of 2^31 entries and more) on top of its bits.
    """
    if base.keys() != after.keys():
        odd = min(base.keys() ^ after.keys())
        raise UserError(f"base and erased network do not both have {odd}: give the run's own base")
    tensors = {}
    for name, x in after.items():
        if base[name].shape != x.shape or base[name].dtype != x.dtype:
            raise UserError(f"base and erased network differ in the shape or type of {name}: give the run's own base")
        bits = (bits_of(base[name]) ^ bits_of(x)).flatten()
        places = bits.nonzero().flatten()
        width = 4 if bits.numel() < 2**31 else 8
        if len(places) == 0:
            continue
        if len(places) * (width + bits.element_size()) < bits.numel() * bits.element_size():
            tensors[name + PLACES] = places.to(INTEGERS[width])
            tensors[name + BITS] = bits[places]
        else:
            tensors[name + BITS] = bits.reshape(x.shape)
    return tensors


def apply_delta(delta: Delta, network: nn.Module) -> None:
    """Turn the base's network into the erased one, in place. Raises UserError, changing nothing, for another one."""
    _change(delta, network, delta.base, delta.erased, "--apply")


def restore_delta(delta: Delta, network: nn.Module) -> None:
    """Undo `apply_delta` bit for bit, in place. Raises UserError, changing nothing, for another network."""
    _change(delta, network, delta.erased, delta.base, "--restore")


def read_delta(path: str | Path) -> Delta:
    """Read a delta. Raises UserError for a file that is missing, damaged or something else."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give the file that --to delta wrote")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no .safetensors file ({error}): export the delta again") from error
    if facts.get("erase_sd.kind") != KIND:
        raise UserError(f"{path} is no delta of ours: give the file that --to delta wrote")
    hashes = facts["erase_sd.base_sha256"], facts["erase_sd.erased_sha256"]
    return Delta(Path(path), facts["erase_sd.part"], *hashes, tensors)


def fingerprint(weights: Weights) -> str:
    """Return the SHA-256, in hex, of names, types, shapes and bits, in the order of the names."""
    total = hashlib.sha256()
    for name, x in sorted(weights.items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
        total.update(bits_of(x).flatten().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def bits_of(x: Tensor) -> Tensor:
    """Return a tensor's bits as integers of the same width, on the CPU."""
    return x.detach().cpu().view(INTEGERS[x.element_size()])


def _change(delta: Delta, network: nn.Module, start: str, end: str, option: str) -> None:
    weights = network.state_dict()
    found = fingerprint(weights)
    if found == end:
        raise UserError(f"{option} {delta.path} has been carried out on this model already: there is nothing to do")
    if found != start:
        raise UserError(
            f"{option} {delta.path} is for the {delta.part} with SHA-256 {start[:12]} in float32, and this one has "
            f"{found[:12]}: give the very model that the delta was made with"
        )
    changed = _changed(delta, weights)
    if fingerprint(changed) != end:
        raise UserError(f"{delta.path} is damaged: what comes out is not what went in; export the delta again")
    network.load_state_dict(changed)


def _changed(delta: Delta, weights: Weights) -> Weights:
    """Return the weights with every bit of the delta turned. Raises UserError for entries that do not fit."""
    changed = dict(weights)
    for name, stored in delta.tensors.items():
        if not name.endswith(BITS):
            continue
        target = name.removesuffix(BITS)
        places = delta.tensors.get(target + PLACES)
        if target not in weights or not _fits(weights[target], stored, places):
            raise UserError(f"{delta.path} is damaged: its entry {name} does not fit; export the delta again")
        bits = bits_of(weights[target]).flatten().clone()
        if places is None:
            bits ^= stored.flatten()
        else:
            bits[places.long()] ^= stored
        changed[target] = bits.view(weights[target].dtype).reshape(weights[target].shape)
    return changed


def _fits(x: Tensor, stored: Tensor, places: Tensor | None) -> bool:
    if stored.dtype != INTEGERS[x.element_size()]:
        return False
    if places is None:
        return stored.shape == x.shape
    inside = len(places) == 0 or (places.min() >= 0 and places.max() < x.numel())
    return places.shape == stored.shape and not places.is_floating_point() and bool(inside)
