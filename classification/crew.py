"""Many runs, some at a time: each in a process of its own with one thread, so that their times can be compared."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tqdm.auto import tqdm


def records(jobs: Iterable[dict[str, Any]], processes: int, description: str) -> list[dict[str, Any]]:
    """The record of every job, `classification.plan.make`'s values, in their order; finished ones cost nothing."""
    jobs = list(jobs)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the workers: one thread, and no bars over ours
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(tqdm(pool.map(_record, jobs), total=len(jobs), desc=description, unit="run"))


def _record(job: dict[str, Any]) -> dict[str, Any]:
    from classification.plan import make
    from classification.runs import unlearn
    from erase_sd.devices import accelerator

    return unlearn(make(**job), accelerator(None))
