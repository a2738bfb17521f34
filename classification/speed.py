"""What the closed form of the projection saves at CIFAR-10's scale: `python -m classification.speed`, random data.

Twice the same network takes the same steps in turn, once with the closed form and once with the projection done as the
released code does it: gradients copied to the host, joined in float64, given to a quadratic-programming solver. Needs
quadprog, which is in the extra "test".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from classification.data.dataset import Dataset, Images
from classification.models.networks import build
from classification.settings import ClassifierSettings
from classification.task import ClassificationTask
from erase_sd.common.cli import command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.processes import accelerator
from erase_sd.common.rng import generator
from erase_sd.core.descent import apply, make_optimizer
from erase_sd.core.projection import collapsed, dot, subtract_
from erase_sd.core.task import Params, gradient
from erase_sd.methods.scissorhands import Scissorhands

CHANNELS, CLASSES = 3, 10


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What to time; the defaults are CIFAR-10's, 10 % of it forgotten."""

    model: str = knob("resnet18", "resnet18, resnet34, smallresnet or smallnet")
    batch_size: int = knob(256, "forget samples, and retain samples, per step")
    steps: int = knob(20, "steps of each kind")
    sensitivity_batches: int = knob(1, "batches of the saliency")
    fraction: float = knob(0.03, "share of the weights that is re-initialised")
    lam: float = knob(0.05, "weight lambda of the forget term")
    retain: int = knob(40_500, "retain examples: what an epoch of the extrapolation walks through")
    size: int = knob(32, "height and width of the images")

    def __post_init__(self) -> None:
        """Raise UserError for nothing to time."""
        for name in ("batch_size", "steps", "sensitivity_batches", "retain", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is too few: give 1 or more")


class Times(NamedTuple):
    """Seconds."""

    trim: float  # saliency and trim
    closed: list[float]  # per step
    solver: list[float]
    closed_alone: list[float]  # of which the projection
    solver_alone: list[float]
    acted: int  # steps whose gradient the constraint changed
    apart: float  # largest difference of the two networks' weights after the last step


def time_projection(speed: Speed) -> None:
    """Time and print."""
    times = measure(speed)
    epoch = math.ceil(speed.retain / speed.batch_size)
    closed, solver = median(times.closed), median(times.solver)
    ratios = [b / a for a, b in zip(times.closed, times.solver, strict=True)]
    print(f"{speed.model}, batches of {speed.batch_size} + {speed.batch_size} random images, {device()}")
    print(f"saliency and trim                 {times.trim:10.4f} s")
    for name, total, alone in (
        ("projection in closed form", closed, times.closed_alone),
        ("float64 QP on the host   ", solver, times.solver_alone),
    ):
        print(f"step, {name}   {total:10.4f} s, of which the projection {median(alone):.4f} s")
    print(f"ratio per step, QP / closed form  {median(ratios):10.4f}   ", end="")
    print(f"(medians over {speed.steps} interleaved steps of each)")
    print(f"the constraint acted in {times.acted} of {speed.steps} steps; weights differ by {times.apart:.1e} at most")
    print(f"EXTRAPOLATED, not measured: an epoch of {epoch} steps takes {closed * epoch:.1f} s in closed form,")
    print(f"                            {solver * epoch:.1f} s with the QP")


def device() -> str:
    """Return where it runs, and with how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU with {torch.get_num_threads()} threads"


def measure(speed: Speed) -> Times:
    """Trim one network, then let both kinds of steps go on from it by turns; return what they took."""
    method = Scissorhands(
        steps=speed.steps, lr=5e-3, sensitivity_batches=speed.sensitivity_batches, fraction=speed.fraction
    )
    tasks = [task_of(speed), task_of(speed)]
    trims, optimizers = [], []
    for task in tasks:
        trims.append(clock(list, method.trim(task))[0])
        optimizers.append(make_optimizer(task.trainable(), method))
    seconds, alone, acted = ([], []), ([], []), 0
    for n in range(speed.steps):
        for kind, project in enumerate((closed_, solved_)):
            took, (part, v) = clock(step, tasks[kind], optimizers[kind], project, n, speed.lam)
            seconds[kind].append(took)
            alone[kind].append(part)
        if v > 0:
            acted += 1
    apart = 0.0
    for a, b in zip(tasks[0].trainable().values(), tasks[1].trainable().values(), strict=True):
        apart = max(apart, float((a - b).detach().abs().max()))
    return Times(trims[1], *seconds, *alone, acted, apart)  # the second trim: the first one warms up as well


def random_images(speed: Speed, name: str) -> Images:
    """Return two batches of random images with random labels, the same at every call."""
    n = 2 * speed.batch_size
    g = generator(0, "speed", name)
    pixels = torch.randint(0, 256, (n, CHANNELS, speed.size, speed.size), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    return Images(pixels=pixels, labels=labels, ids=tuple(map(str, range(n))))


def task_of(speed: Speed) -> ClassificationTask:
    """Return a fresh network with random images to forget and to retain, the same at every call."""
    forget, retain = random_images(speed, "forget"), random_images(speed, "retain")
    grey = {"mean": (0.5,) * CHANNELS, "std": (0.25,) * CHANNELS}
    names = tuple(map(str, range(CLASSES)))
    dataset = Dataset(name="random", train=retain, test=retain, classes=names, augment="crop-flip", **grey)
    model = build(speed.model, classes=CLASSES, channels=CHANNELS, seed=0, **grey)
    settings = ClassifierSettings(batch_size=speed.batch_size)
    return ClassificationTask(model, dataset, forget, retain, settings, 0, accelerator(None))


def step(
    task: ClassificationTask,
    optimizer: torch.optim.Optimizer,
    project: Callable[[Params, Params, float], float],
    n: int,
    lam: float,
) -> tuple[float, float]:
    """Take a step of Algorithm 1's repair; return the seconds of the projection and the multiplier v."""
    theta, batch = task.trainable(), task.batch("repair", n)
    g_f = gradient(task, task.forget, batch, theta)
    g = gradient(task, task.retain, batch, theta)
    projected = clock(project, g, g_f, lam)
    apply(optimizer, theta, g, "nearest", task.seed, n)
    return projected


def closed_(g: Params, g_f: Params, lam: float) -> float:
    """Turn g_r into the projected g in place, as `core.repair` does it; return v."""
    c = collapsed(float(dot(g, g_f)), float(dot(g_f, g_f)), lam)
    subtract_(g, g_f, c)
    return c - lam


def solved_(g: Params, g_f: Params, lam: float) -> float:
    """Turn g_r into the projected g_o = g_r - lam g_f in place; return v, 0 where nothing had to be projected.

    GEM's dual program on the host in float64: min 1/2 v'(MM')v + (M g_o)'v over v >= 0, with the one memory M = -g_f.
    """
    subtract_(g, g_f, lam)
    u, memory = _joined(g), -_joined(g_f)[None]
    if memory @ u >= 0:
        return 0.0
    v = dual(memory, u)
    rest = torch.from_numpy(u + v @ memory)
    for x in g.values():
        part, rest = rest[: x.numel()], rest[x.numel() :]
        x.copy_(part.view(x.shape))
    return float(v[0])


def _joined(x: Params) -> np.ndarray:
    """Return all entries (n,) in float64 on the host."""
    return torch.cat([part.reshape(-1) for part in x.values()]).cpu().double().numpy()


def dual(memory: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return v (m,) for memories (m, n) and a gradient u (n,), all float64. Raises UserError without quadprog."""
    try:
        from quadprog import solve_qp
    except ModuleNotFoundError as error:
        raise UserError("quadprog is not installed: pip install quadprog, or the extra test") from error
    m = len(memory)
    return solve_qp(memory @ memory.T, -memory @ u, np.eye(m), np.zeros(m))[0]


def clock(work: Callable, *args: Any) -> tuple[float, Any]:
    """Return the seconds until work(*args) is really done, and its result."""
    wait()
    start = time.perf_counter()
    result = work(*args)
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


main = command("speed", "Time the projection in closed form and by a solver.", Speed, time_projection)

if __name__ == "__main__":
    run_main(main)
