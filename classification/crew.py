"""Many runs, some at a time: each in a process of its own with one thread, so that their times can be compared."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from classification.plan import Plan, make
from erase_sd.runtime import digest


def unlearned(plan: Plan) -> dict[str, Any]:
    """The record of the plan's run, which is carried out if it is not there yet."""
    from classification.runs import unlearn
    from erase_sd.devices import accelerator

    return unlearn(plan, accelerator(None))


def records(
    jobs: Iterable[dict[str, Any]],
    processes: int,
    description: str,
    work: Callable[[Plan], dict[str, Any]] = unlearned,
) -> list[dict[str, Any]]:
    """What `work` returns for every job, `classification.plan.make`'s values, in their order.

    Finished runs cost little. A run's folder belongs to one process at a time: jobs that come to the same run are
    carried out once, and one job of each network that is to forget goes ahead, to train it. Raises UserError as `make`
    and `work` do.
    """
    plans = [make(**job) for job in jobs]
    names = [digest([plan.config(), plan.job.output_dir]) for plan in plans]
    runs = dict(zip(names, plans, strict=True))
    ahead = {(p.data.dataset, p.data.split_seed, p.job.train_seed, p.job.raw): p for p in plans}
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the workers: one thread, and no bars over ours
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_follow) as pool:
        bar = tqdm(total=len(runs), desc=description, unit="run")
        list(pool.map(work, ahead.values()))
        done = {}
        for name, record in zip(runs, pool.map(work, runs.values()), strict=True):
            done[name] = record
            bar.update()
        bar.close()
    return [done[name] for name in names]


def _follow() -> None:
    """Make the worker end with its parent: one that stays would keep its run locked."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
