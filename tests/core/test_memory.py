"""A device that runs out of memory: the micro-batch is found, no step is lost, and one graph is alive at a time."""

import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from erase_sd.common.memory import fitting
from erase_sd.core.descent import Term, differentiate, measure
from erase_sd.core.repair import repair
from erase_sd.core.sensitivity import accumulate
from erase_sd.core.task import gradient


def test_a_run_on_a_small_device_is_the_run_with_that_micro_batch_from_the_start(toy, knobs):
    small, known = toy(), toy(sizes=(2, 2, 2, 2))
    small.limit = 3
    records = {}
    for name, task in (("small", small), ("known", known)):
        records[name] = [record for record, _ in repair(task, knobs)]
    assert len(records["small"]) == knobs.steps
    assert str(records["small"]) == str(records["known"])  # NaN is not equal to itself
    for p, q in zip(small.model.parameters(), known.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_memory_that_runs_out_later_loses_no_step(toy, settings):
    knobs = settings("paper", steps=4)
    whole, late = toy(dtype=torch.float64), toy(dtype=torch.float64)
    for _ in repair(whole, knobs):
        pass
    for record, _ in repair(late, knobs):
        if record["step"] == 1:
            late.limit = 4
    assert late.sizes == (4, 4)
    for p, q in zip(whole.model.parameters(), late.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)  # sums in another order


def test_gradients_means_and_losses_find_it_too(toy):
    whole = toy(sizes=(1,) * 8)
    batch, theta = whole.batch("test", 0), whole.trainable()
    for asked in (
        lambda task: gradient(task, task.contrast, batch, task.trainable()),
        lambda task: list(accumulate(task, task.forget, task.trainable(), "sensitivity", range(2)))[-1],
        lambda task: {"loss": torch.tensor(measure(task, task.contrast, batch, "contrast"))},
    ):
        small = toy()
        small.limit = 1
        expected, found = asked(whole), asked(small)
        assert small.sizes == (1,) * 8
        for name, x in expected.items():
            assert torch.equal(found[name], x), name
    assert theta.keys() == whole.trainable().keys()


def test_a_device_too_small_for_one_sample_says_so(toy):
    task = toy()
    task.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        gradient(task, task.forget, task.batch("test", 0), task.trainable())
    assert all(p.grad is None for p in task.model.parameters())


def test_other_errors_are_not_tried_again():
    tries = []

    def work() -> None:
        tries.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting(work, lambda: True)
    assert len(tries) == 1


def test_what_a_failed_try_held_is_gone_before_the_next(toy):
    held: list[weakref.ref] = []

    def work() -> bool:
        if held:
            return held[0]() is None
        kept = torch.zeros(3)
        held.append(weakref.ref(kept))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")

    assert fitting(work, lambda: True)


class Kept:
    """A tensor that a graph keeps, counted as long as it does."""

    alive: ClassVar[set[int]] = set()
    most = 0

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.alive.add(id(self))
        Kept.most = max(Kept.most, len(self.alive))

    def __del__(self) -> None:
        self.alive.discard(id(self))


def most_kept(work: Callable[[], object]) -> int:
    """The most tensors that graphs keep at one moment."""
    Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        work()
    return Kept.most


def test_one_graph_is_alive_at_a_time(toy):
    task = toy()
    batch, theta = task.batch("test", 0), task.trainable()
    one = most_kept(lambda: differentiate(task, {"forget": Term(task.forget)}, batch, theta))
    terms = {"retain": Term(task.retain), "contrast": Term(task.contrast, 0.5)}
    assert one > 0
    assert most_kept(lambda: differentiate(task, terms, batch, theta)) <= one + 2  # a scalar's weight and share
    assert most_kept(lambda: gradient(task, task.contrast, batch, theta)) <= one + 2
    assert most_kept(lambda: task.backward(sum(task.contrast(batch)))) > 1.5 * one  # both at once
