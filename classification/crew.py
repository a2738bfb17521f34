"""Many runs, some at a time, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from classification.plan import Plan, make
from erase_sd.runtime import digest
from erase_sd.workers import workers


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
    with workers(processes) as pool:
        bar = tqdm(total=len(runs), desc=description, unit="run")
        list(pool.map(work, ahead.values()))
        done = {}
        for name, record in zip(runs, pool.map(work, runs.values()), strict=True):
            done[name] = record
            bar.update()
        bar.close()
    return [done[name] for name in names]
