"""What to do when a device runs out of memory: tell such an error from others, and make room for a smaller try."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Result = TypeVar("Result")


def fitting(work: Callable[[], Result], smaller: Callable[[], bool]) -> Result:
    """Return work(), tried again, smaller each time, as often as memory runs out.

    `smaller` makes the next try need less, and returns whether it can. Raises the last error where it cannot, and
    every error that is not about memory.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not should_reduce_batch_size(error) or not smaller():
                raise
        clear_device_cache(garbage_collection=True)  # not in the handler: the error's frames hold the graph
