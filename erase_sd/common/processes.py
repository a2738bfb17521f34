"""The processes of a job: their accelerator and trackers, work that they share, and pools of workers."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import distributed
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.signals import StopFlag

PRECISION = "ACCELERATE_MIXED_PRECISION"  # how `accelerate launch` hands its configuration on
PATIENCE = timedelta(days=1)  # one process may sample the last images while the others wait; a launcher sees the dead


def check_precision(mixed_precision: str) -> None:
    """Refuse fp16, whose range ends at 65504: gradients overflow it and underflow. Raises UserError."""
    if mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 loses gradients, large ones and small ones: give bf16, or no")


def best_precision(asked: str | None) -> str | None:
    """Return the autocast of a job: what was asked for here or of accelerate, else bf16 on a GPU that computes in it.

    None leaves it to accelerate, whose own default is none.
    """
    if asked is None and PRECISION not in os.environ and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return asked


def accelerator(
    mixed_precision: str | None, report_to: str | None = None, folder: str | Path | None = None
) -> Accelerator:
    """Return the accelerator: device, precision and process group as `accelerate launch` or torchrun set them up.

    `report_to` names a tracker of accelerate, which writes its files below `folder`. Raises UserError for fp16, for a
    tracker that is not installed, which accelerate would leave out without a word, and for one that needs a folder and
    has none.
    """
    check_precision(mixed_precision or os.environ.get(PRECISION, "no"))
    if report_to and report_to not in map(str, get_available_trackers()):
        how = "install the trackers extra" if report_to == "tensorboard" else f"pip install {report_to}"
        raise UserError(f"--report_to {report_to} is not installed: {how}, or give --report_to none")
    if report_to and LOGGER_TYPE_TO_CLASS[report_to].requires_logging_directory and not folder:
        raise UserError(f"--report_to {report_to} writes files: give an output_dir")
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=report_to,
        project_dir=str(Path(folder) / "logs") if folder else None,
        # micro-batches carry their share of the loss already: the launcher's number would divide it once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


@contextmanager
def tracked(accelerator: Accelerator, config: dict[str, Any]) -> Iterator[None]:
    """Give the accelerator's trackers the configuration, and close them however the block ends.

    Without trackers, or with those that a caller has started already, it does nothing.
    """
    if accelerator.trackers:
        yield
        return
    flat = {}
    for name, value in config.items():
        flat[name] = _flat(value)
    accelerator.init_trackers("erase-sd", config=flat)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def _flat(value: Any) -> bool | int | float | str:
    """Return a value as every tracker takes it: numbers as they are, anything else as text."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, bool | int | float) else str(value)


def shared(items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield work(item) for every item, in order, alike in all processes: rank i modulo their number does item i.

    All have to call it with items of the same number. One that is told to stop has all of them raise SystemExit after
    the items at hand; an error in one ends the others through their launcher.
    """
    many = distributed.is_available() and distributed.is_initialized()
    ranks, rank = (distributed.get_world_size(), distributed.get_rank()) if many else (1, 0)
    for start in range(0, len(items), ranks):
        turn = items[start : start + ranks]
        mine = _done(work, turn[rank]) if rank < len(turn) else None
        for source in range(len(turn)):
            result = [mine if source == rank else None]
            if many:
                distributed.broadcast_object_list(result, source)
            if isinstance(result[0], SystemExit):
                raise result[0]
            yield result[0]


def _done(work: Callable[[Any], Any], item: Any) -> Any:
    """Return the result, or the SystemExit of a process that was told to stop: all of them raise it."""
    try:
        with StopFlag() as stop:
            result = work(item)
            stop.leave()
    except SystemExit as stopped:
        return stopped
    return result


def sample_shared(
    prompts: list[str],
    seeds: list[int],
    size: int,
    work: Callable[[list[str], list[int]], Sequence[Any]],
    description: str,
) -> list[Sequence[Any]]:
    """Return work(prompts, seeds) for every `size` of the prompts, in order; the processes share the work.

    The first process shows a bar over images. Raises SystemExit in all of them when one is told to stop.
    """

    def sample_batch(start: int) -> Sequence[Any]:
        return work(prompts[start : start + size], seeds[start : start + size])

    hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
    done = []
    with tqdm(total=len(prompts), desc=description, unit="image", **hidden) as bar:
        for images in shared(range(0, len(prompts), size), sample_batch):
            done.append(images)
            bar.update(len(images))
    return done


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes without progress bars of their own; they end with their parent, however that ends.

    An error or a signal in the block drops the work that has not begun.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # workers inherit them; no bars over the parent's
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_follow)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _follow() -> None:
    """Make the worker end with its parent: one that stays would keep its run locked."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
