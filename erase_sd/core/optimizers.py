"""Optimizers by name; weights in bf16 take fp32 steps, and may keep what their own bits cannot hold.

bf16 has 8 significant bits: a step below 1/512 of a weight vanishes when the result is rounded to the nearest value.
So the optimizer works on fp32 copies, made bucket by bucket and dropped after the step, and `rounding` says what
becomes of the other 16 bits:

    nearest     they are dropped
    stochastic  they are the probability of rounding up, so that the expected weight is the fp32 one
    kahan       they are kept in a 16-bit buffer and join the next step: fp32 master weights in two halves
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
    """Which optimizer takes the steps, how far, and how it rounds."""

    lr: float = knob(1e-5, "peak learning rate", ("learning_rate",))
    optimizer: Literal["sgd", "adamw", "adamw8bit", "paged-adamw8bit"] = knob(
        "sgd", "optimizer; the 8-bit ones are those of bitsandbytes"
    )
    rounding: Literal["nearest", "stochastic", "kahan"] = knob(
        "nearest", "of bf16 weights after a step: to the nearest, up or down by chance, or keeping the rest in 16 bits"
    )
    momentum: float = knob(0.0, "momentum of sgd, in [0, 1)")
    weight_decay: float = knob(0.0, "weight decay, as the optimizer defines it")

    SIGNED: ClassVar[frozenset[str]] = frozenset()  # numbers that may be negative

    def __post_init__(self) -> None:
        """Raise UserError for a negative number that has no meaning."""
        not_negative(self, self.SIGNED)
        if self.momentum >= 1:
            raise UserError(f"--momentum {self.momentum} is not below 1, where steps only grow: give less")

    @property
    def state_bytes(self) -> int:
        """Return the bytes that the optimizer keeps per trained entry, `kahan`'s 16 bits included."""
        kept = STATE_BYTES[self.optimizer]
        if self.optimizer == "sgd" and self.momentum:
            kept += 4
        if self.rounding == "kahan":
            kept += 2
        return kept


Parameters = list[nn.Parameter]


def sgd(theta: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return torch's SGD with momentum."""
    return torch.optim.SGD(
        theta, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
    )


def adamw(theta: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return torch's AdamW."""
    return torch.optim.AdamW(theta, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def adamw8bit(theta: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with moments of 8 bits."""
    return _bitsandbytes(theta, settings).AdamW8bit(theta, lr=settings.lr, weight_decay=settings.weight_decay)


def paged_adamw8bit(theta: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the same with moments that move to the host when the device is full."""
    return _bitsandbytes(theta, settings).PagedAdamW8bit(theta, lr=settings.lr, weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerSettings], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "paged-adamw8bit": paged_adamw8bit,
}


def make_optimizer(theta: dict[str, nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters, in their order; over fp32 stand-ins, empty, of narrower ones.

    Raises UserError for an 8-bit optimizer that bitsandbytes cannot provide here.
    """
    wide = [p if _is_wide(p) else nn.Parameter(torch.empty(0, device=p.device)) for p in theta.values()]
    return OPTIMIZERS[settings.optimizer](wide, settings)


@torch.no_grad()
def apply(
    optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], g: Params, rounding: str, seed: int, step: int
) -> None:
    """Take one step of the optimizer along g, in fp32 or wider; no parameter keeps a gradient."""
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
    """Return the optimizer's own tensors by "<parameter>/<slot>"; a count that is a number as an int64 scalar."""
    own: Params = {}
    for name, p in zip(theta, _wide(optimizer), strict=True):
        for slot, x in optimizer.state[p].items():
            if slot.startswith("qmap"):  # bitsandbytes' table of the 256 values, shared by all parameters
                continue
            own[f"{name}/{slot}"] = torch.tensor(x) if isinstance(x, int) else x
    return own


def put(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], stored: Params) -> None:
    """Give an optimizer copies of what `slots` returned."""
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
    """Return what the optimizer steps, in the order of the parameters it was made for."""
    return optimizer.param_groups[0]["params"]


def _is_wide(p: Tensor) -> bool:
    return p.dtype == torch.promote_types(p.dtype, torch.float32)


def _buckets(theta: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """Yield all names, in order, a bucket being full once its copies in fp32 are."""
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
    """Return bf16 weights in fp32, with the 16 bits that were kept of them."""
    if low is None:
        return p.float()
    return (p.view(torch.int16).int() * LOW + low).view(torch.float32)


def _round_(p: Tensor, x: Tensor, rounding: str, rng: torch.Generator, state: dict[str, Any]) -> None:
    """Set p <- x, fp32, in the bits of p; what `kahan` keeps goes into the state."""
    if rounding == "nearest":
        p.copy_(x)
        return
    bits = x.view(torch.int32)
    if rounding == "kahan":
        up = LOW // 2
    else:
        up = torch.randint(LOW, x.shape, generator=rng, dtype=bits.dtype, device=x.device)
    upper = (bits + up) >> 16
    p.copy_(upper.to(torch.int16).view(p.dtype))
    if rounding == "kahan":
        state["kahan"] = (bits - upper * LOW).to(torch.int16)


def _generator(p: Tensor, *key: int | str) -> torch.Generator:
    """Return a keyed generator on the device of p."""
    return torch.Generator(p.device).manual_seed(generator(*key).initial_seed())


def _bitsandbytes(theta: Parameters, settings: OptimizerSettings) -> ModuleType:
    """Return bitsandbytes' optimizers, imported only when one is asked for."""
    name = settings.optimizer
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except ImportError as error:
        raise UserError(
            f"--optimizer {name} needs bitsandbytes ({error}): install it or use --optimizer adamw"
        ) from error
    cuda = theta[0].device.type == "cuda"
    if cuda and not getattr(lib, "compiled_with_cuda", False):
        raise UserError(f"--optimizer {name}: bitsandbytes has no CUDA library here: use --optimizer adamw")
    if not cuda and name.startswith("paged"):
        raise UserError(f"--optimizer {name} pages out of a CUDA device and there is none: use adamw8bit")
    return bitsandbytes.optim
