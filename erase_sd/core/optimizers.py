"""Optimisers by name; weights in bf16 take fp32 steps, and may keep what their own bits cannot hold.

bf16 has 8 significant bits: a step below 1/512 of a weight vanishes when the result is rounded to the nearest value.
So the optimiser works on fp32 copies, made bucket by bucket and dropped after the step, and `rounding` says what
becomes of the other 16 bits:

    nearest     they are dropped
    stochastic  they are the probability of rounding up, so that the expected weight is the fp32 one
    kahan       they are kept in a 16-bit buffer and join the next step: exactly fp32 weights, in two halves
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob, not_negative
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.task import Params

BUCKET = 1 << 24  # entries of bf16 weights that exist in fp32 at a time
STATE_BYTES = {"sgd": 0, "adamw": 8, "adamw8bit": 2, "paged-adamw8bit": 2}  # per entry; momentum is 4 more
LOW = 1 << 16  # a bf16 is the upper 16 bits of an fp32: steps of the lower ones between two of its values


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimiser takes the steps, how far, and how it rounds."""

    lr: float = knob(1e-5, "peak learning rate")
    optimizer: Literal["sgd", "adamw", "adamw8bit", "paged-adamw8bit"] = knob(
        "sgd", "optimiser; the 8-bit ones are those of bitsandbytes"
    )
    rounding: Literal["nearest", "stochastic", "kahan"] = knob(
        "nearest", "of bf16 weights after a step: to the nearest, up or down by chance, or keeping the rest in 16 bits"
    )
    momentum: float = knob(0.0, "momentum of sgd, in [0, 1)")
    weight_decay: float = knob(0.0, "weight decay, as the optimiser defines it")

    SIGNED: ClassVar[frozenset[str]] = frozenset()  # numbers that may be negative

    def __post_init__(self) -> None:
        """Raise UserError for a negative number that has no meaning."""
        not_negative(self, self.SIGNED)

    @property
    def state_bytes(self) -> int:
        """Return the bytes that the optimizer keeps per trained entry, `kahan`'s 16 bits included."""
        kept = STATE_BYTES[self.optimizer]
        if self.optimizer == "sgd" and self.momentum:
            kept += 4
        if self.rounding == "kahan":
            kept += 2
        return kept


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimizerSettings], torch.optim.Optimizer]] = {
    "sgd": lambda theta, k: torch.optim.SGD(
        theta, lr=k.lr, momentum=k.momentum, weight_decay=k.weight_decay, fused=True
    ),
    "adamw": lambda theta, k: torch.optim.AdamW(theta, lr=k.lr, weight_decay=k.weight_decay, fused=True),
    "adamw8bit": lambda theta, k: _bitsandbytes(theta, k).AdamW8bit(theta, lr=k.lr, weight_decay=k.weight_decay),
    "paged-adamw8bit": lambda theta, k: _bitsandbytes(theta, k).PagedAdamW8bit(
        theta, lr=k.lr, weight_decay=k.weight_decay
    ),
}


def make_optimizer(theta: dict[str, nn.Parameter], knobs: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser of the knobs over the parameters, in their order; over fp32 stand-ins, empty, of narrower ones.

    Raises UserError for an 8-bit optimiser that bitsandbytes cannot provide here.
    """
    wide = [p if _is_wide(p) else nn.Parameter(torch.empty(0, device=p.device)) for p in theta.values()]
    return OPTIMIZERS[knobs.optimizer](wide, knobs)


@torch.no_grad()
def apply(
    optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], g: Params, rounding: str, seed: int, step: int
) -> None:
    """One step of the optimiser along g, in fp32 or wider; no parameter keeps a gradient."""
    wide = dict(zip(theta, _wide(optimizer), strict=True))
    for bucket in _buckets(theta):
        for name in bucket:
            if wide[name] is not theta[name]:
                wide[name].data = _widened(theta[name], optimizer.state[wide[name]].get("kahan"))
            wide[name].grad = g[name]
        optimizer.step()
        for name in bucket:
            wide[name].grad = None
            if wide[name] is not theta[name]:
                rng = _generator(theta[name], seed, "rounding", step, name)
                _round_(theta[name], wide[name].data, rounding, rng, optimizer.state[wide[name]])
                wide[name].data = torch.empty(0, device=theta[name].device)


def slots(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter]) -> Params:
    """The optimiser's own tensors as "<parameter>/<slot>"; a count that is a Python number as an int64 scalar."""
    return {
        f"{name}/{slot}": torch.tensor(x) if isinstance(x, int) else x
        for name, p in zip(theta, _wide(optimizer), strict=True)
        for slot, x in optimizer.state[p].items()
        if not slot.startswith("qmap")  # bitsandbytes' table of the 256 values, shared by all parameters
    }


def put(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], stored: Params) -> None:
    """Give an optimiser copies of what `slots` returned."""
    wide = dict(zip(theta, _wide(optimizer), strict=True))
    for key, x in stored.items():
        name, _, slot = key.rpartition("/")
        p, state = wide[name], optimizer.state[wide[name]]
        if x.ndim == 0 and x.dtype == torch.int64:
            state[slot] = int(x)
            continue
        state[slot] = x.to(p.device, copy=True)
        if getattr(optimizer, "is_paged", False) and slot.startswith("state"):
            state[slot] = optimizer.get_state_buffer(state[slot], x.dtype).copy_(state[slot])
        if x.dtype == torch.uint8:
            table = {"state1": "dynamic", "state2": "udynamic"}[slot]
            state[slot.replace("state", "qmap")] = optimizer.name2qmap[table].to(p.device)


def _wide(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimiser steps, in the order of the parameters it was made for."""
    return optimizer.param_groups[0]["params"]


def _is_wide(p: Tensor) -> bool:
    return p.dtype == torch.promote_types(p.dtype, torch.float32)


def _buckets(theta: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """All names, in order, a bucket being full once its copies in fp32 are."""
    bucket, entries = [], 0
    for name, p in theta.items():
        bucket.append(name)
        entries += 0 if _is_wide(p) else p.numel()
        if entries >= BUCKET:
            yield bucket
            bucket, entries = [], 0
    if bucket:
        yield bucket


def _widened(p: Tensor, low: Tensor | None) -> Tensor:
    """bf16 weights in fp32, with the 16 bits that were kept of them."""
    return p.float() if low is None else (p.view(torch.int16).int() * LOW + low).view(torch.float32)


def _round_(p: Tensor, x: Tensor, rounding: str, rng: torch.Generator, state: dict[str, Any]) -> None:
    """p <- x, fp32, in the bits of p; what `kahan` keeps goes into the state."""
    if rounding == "nearest":
        p.copy_(x)
        return
    bits = x.view(torch.int32)
    up = (
        LOW // 2
        if rounding == "kahan"
        else torch.randint(LOW, x.shape, generator=rng, dtype=bits.dtype, device=x.device)
    )
    upper = (bits + up) >> 16
    p.copy_(upper.to(torch.int16).view(p.dtype))
    if rounding == "kahan":
        state["kahan"] = (bits - upper * LOW).to(torch.int16)


def _generator(p: Tensor, *key: int | str) -> torch.Generator:
    """A keyed generator where p is."""
    return torch.Generator(p.device).manual_seed(generator(*key).initial_seed())


def _bitsandbytes(theta: list[nn.Parameter], knobs: OptimizerSettings) -> ModuleType:
    """bitsandbytes' optimisers, imported only when one is asked for."""
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except ImportError as error:
        raise UserError(
            f"--optimizer {knobs.optimizer} needs bitsandbytes ({error}): install it or use --optimizer adamw"
        ) from error
    cuda = theta[0].device.type == "cuda"
    if cuda and not getattr(lib, "compiled_with_cuda", False):
        raise UserError(f"--optimizer {knobs.optimizer}: bitsandbytes has no CUDA library here: use --optimizer adamw")
    if not cuda and knobs.optimizer.startswith("paged"):
        raise UserError(f"--optimizer {knobs.optimizer} pages out of a CUDA device and there is none: use adamw8bit")
    return bitsandbytes.optim
