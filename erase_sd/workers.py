"""Processes that work side by side, one thread each, so that their times can be compared."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes without progress bars of their own; they end with their parent, however that ends.

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
