"""A repair run as its caller sees it: records, states, resuming, stopping on numbers that are not finite."""

import itertools
import math

import pytest
import torch

from erase_sd.core.repair import Repair, repair


def run(task, knobs, state=None):
    return [record for record, _ in repair(task, knobs, state)]


def stopped_after(task, knobs, steps):
    """The state after so many steps, stored as a checkpoint stores it."""
    *_, (_, state) = itertools.islice(repair(task, knobs), steps)
    return {"step": state["step"], "optimizer": {key: x.clone() for key, x in state["optimizer"].items()}}


def weights(task):
    return {name: p.detach().clone() for name, p in task.model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(toy, knobs):
    whole = toy()
    records = run(whole, knobs)
    for steps in range(1, knobs.steps):
        task = toy()
        state = stopped_after(task, knobs, steps)
        again = toy()
        again.model.load_state_dict(task.model.state_dict())
        assert str(run(again, knobs, state)) == str(records[steps:])  # as text: NaN equals NaN
        assert_equal(weights(again), weights(whole))


def test_the_state_is_flat_named_tensors_and_resuming_leaves_it_alone(toy, settings):
    task, knobs = toy(), settings("adamw")
    state = stopped_after(task, knobs, 2)
    assert state["step"] == 2
    assert set(state["optimizer"]) == {f"{n}/{s}" for n in task.trainable() for s in ("step", "exp_avg", "exp_avg_sq")}
    before = {key: x.clone() for key, x in state["optimizer"].items()}
    run(task, knobs, state)
    assert_equal(state["optimizer"], before)


def test_only_trainable_parameters_move_and_no_gradient_is_kept(toy, knobs):
    task = toy()
    before = weights(task)
    for _ in repair(task, knobs):
        assert all(p.grad is None for p in task.model.parameters())
    for name, p in task.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in task.trainable()), name


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_weights_before_it(toy, knobs):
    task = toy()
    name = "retain" if knobs.retain_loss == "data" else "preserve"
    keep, calls = getattr(task, name), itertools.count()
    setattr(task, name, lambda batch: keep(batch) * (math.nan if next(calls) == 3 else 1))
    steps = repair(task, knobs)
    for _ in range(3):
        next(steps)
    before = weights(task)
    with pytest.raises(FloatingPointError, match="repair step 3: the retain loss is nan"):
        next(steps)
    assert_equal(weights(task), before)


def test_a_gradient_that_is_not_finite_stops_with_the_parameters_name(toy, settings):
    task = toy()
    backward = task.backward

    def poisoned(loss):
        backward(loss)
        task.model[3].weight.grad[0, 0] = math.inf

    task.backward = poisoned
    with pytest.raises(FloatingPointError, match=r"repair step 0: the gradient of 3\.weight"):
        next(repair(task, settings("paper")))


def test_records_are_complete(toy, knobs):
    records = run(toy(), knobs)
    assert [r["step"] for r in records] == list(range(6))
    keys = {"step", "loss_r", "loss_f", "loss_o", "cos", "c", "bit", "ceiling", "lr"}
    for r in records:
        assert set(r) == keys
        assert math.isnan(r["cos"]) or -1 <= r["cos"] <= 1


def test_zero_steps_change_nothing(toy, settings):
    task = toy()
    before = weights(task)
    assert run(task, settings("paper", steps=0)) == []
    assert_equal(weights(task), before)


def test_negative_knobs_are_refused():
    with pytest.raises(ValueError, match="lam -0.1"):
        Repair(lam=-0.1)
    with pytest.raises(ValueError, match="lr nan"):
        Repair(lr=math.nan)


def test_nothing_depends_on_the_global_generator(toy, settings):
    results = []
    for seed in (1, 2):
        torch.rand(seed)  # moves it by different amounts
        task = toy()
        run(task, settings("adamw"))
        results.append(weights(task))
    assert_equal(*results)
