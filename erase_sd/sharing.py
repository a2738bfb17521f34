"""Work shared among the processes of a job: each item is done by one of them, and all get every result.

Pictures depend on their prompts, their seeds and who is in a batch with them, not on the process that draws them: what
comes out is what one process alone would draw, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import distributed
from tqdm.auto import tqdm

from erase_sd.process import StopFlag


def shared(items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """work(item) for every item, in their order, alike in all processes: item i is done by rank i modulo their number.

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
    """The result, or the exit that this process owes; it is everybody's."""
    try:
        with StopFlag() as stop:
            result = work(item)
            stop.leave()
    except SystemExit as stopped:
        return stopped
    return result


def pictures(
    prompts: list[str],
    seeds: list[int],
    size: int,
    work: Callable[[list[str], list[int]], Sequence[Any]],
    description: str,
) -> list[Sequence[Any]]:
    """work(prompts, seeds) for every `size` of the prompts, shared; the first process shows a bar over pictures."""
    parts = [(prompts[i : i + size], seeds[i : i + size]) for i in range(0, len(prompts), size)]
    hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
    done = []
    with tqdm(total=len(prompts), desc=description, unit="image", **hidden) as bar:
        for part in shared(parts, lambda part: work(*part)):
            done.append(part)
            bar.update(len(part))
    return done
