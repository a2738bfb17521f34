"""One training loop for the parts of the pocket model: one-cycle AdamW, keyed batches, EMA, resume, bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.signals import StopFlag
from erase_sd.run.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint

EVERY = 250  # steps between two checkpoints


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.06) -> float:
    """Compute the learning rate at a step: linear rise over the first 6 %, cosine fall to 1 % of the peak."""
    x = (step + 1) / steps
    if x < warmup:
        return peak * x / warmup
    return peak * (0.01 + 0.99 * (0.5 + 0.5 * torch.cos(torch.tensor((x - warmup) / (1 - warmup) * torch.pi)).item()))


def _state(model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather everything a continuation needs, flat: weights, their average, the optimizer's moments."""
    state = {f"model/{n}": t for n, t in model.state_dict().items()} | {f"ema/{n}": t for n, t in ema.items()}
    for name, p in model.named_parameters():
        state |= {f"optimizer/{name}/{slot}": t for slot, t in optimizer.state[p].items()}
    return {k: t.contiguous() for k, t in state.items()}


def _restore(
    state: dict[str, Tensor], model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `_state` gathered, in place."""
    model.load_state_dict({k.removeprefix("model/"): t for k, t in state.items() if k.startswith("model/")})
    for name, p in model.named_parameters():
        ema[name] = state[f"ema/{name}"].to(p.device)
        prefix = f"optimizer/{name}/"
        slots = [key for key in state if key.startswith(prefix)]
        optimizer.state[p] = {key.removeprefix(prefix): state[key].to(p.device) for key in slots}


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    folder: Path,
    *,
    steps: int,
    lr: float,
    decay: float = 0.995,
    weight_decay: float = 1e-3,
) -> None:
    """Minimise loss(step) over the model's parameters and leave the averaged weights in it; resumes from `folder`.

    `loss` draws its batch from a generator keyed by the step, so that a resumed training equals an uninterrupted one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = _resume(folder, steps, model, ema, optimizer)
    with StopFlag() as stop, tqdm(total=steps, initial=start, desc=folder.name, unit="step") as bar:
        for step in range(start, steps):
            optimizer.param_groups[0]["lr"] = one_cycle(step, steps, lr)
            value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _average_(ema, model, min(decay, (step + 1) / (step + 10)))
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")
            if (step + 1) % EVERY == 0 or step + 1 == steps or stop.is_set():
                save_checkpoint(folder, step + 1, _state(model, ema, optimizer), {"step": step + 1, "steps": steps}, 1)
            if stop.is_set():
                raise SystemExit(128 + stop.signum)
    model.load_state_dict(ema, strict=False)


def fit_cycles(cycles: tuple[int, ...], fit_one: Callable[[int, int, Path], None], folder: Path) -> None:
    """Call fit_one(index, steps before, folder) for each cycle in turn.

    A cycle that has left no checkpoint is over where a later one has: the later one began with what it had learnt.
    """
    folders = [folder / f"cycle-{i + 1}" for i in range(len(cycles))]
    begun = [latest_checkpoint(place) is not None for place in folders]
    for i, place in enumerate(folders):
        if begun[i] or not any(begun[i + 1 :]):
            fit_one(i, sum(cycles[:i]), place)


def _resume(
    folder: Path, steps: int, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Restore the newest checkpoint, if there is one; returns the step to go on with."""
    if (found := latest_checkpoint(folder)) is None:
        return 0
    state, meta = load_checkpoint(found)
    if meta["steps"] != steps:
        raise UserError(f"{found} belongs to a training of {meta['steps']} steps, not {steps}: remove {folder}")
    if meta["step"] == steps:
        ema.update(_averaged(state))
    else:
        _restore(state, model, ema, optimizer)
    return meta["step"]


def _averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the averaged weights out of a checkpoint."""
    return {name.removeprefix("ema/"): state[name] for name in state if name.startswith("ema/")}


def warm_start(begun: Path, start: Path) -> None:
    """Write the averaged weights of a training's newest checkpoint to `start` as a finished one, in fp16.

    A later cycle goes on from there on any machine: it needs neither Adam's moments nor what was before the average.
    """
    if (found := latest_checkpoint(begun)) is None:
        raise UserError(f"there is no checkpoint in {begun}")
    state, meta = load_checkpoint(found)
    tensors = {f"ema/{name}": tensor.half() for name, tensor in _averaged(state).items()}
    save_checkpoint(start, meta["step"], tensors, {"step": meta["step"], "steps": meta["step"]}, 1)


def _average_(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the exponential average of the weights on, in place."""
    for name, p in model.named_parameters():
        ema[name].lerp_(p.detach(), 1 - decay)
