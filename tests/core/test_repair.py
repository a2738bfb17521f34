"""The repair loop against Algorithm 1 written out by hand, and where each setting departs from it."""

import dataclasses

import pytest
import torch

from erase_sd.core.descent import Term, differentiate, learning_rate
from erase_sd.core.repair import Repair, repair
from erase_sd.core.task import gradient


def run(task, knobs):
    return [record for record, _ in repair(task, knobs)]


def weights(task):
    return {name: p.detach().clone() for name, p in task.model.named_parameters()}


def flat(g):
    return torch.cat([x.detach().reshape(-1) for x in g.values()])


def algorithm_1(task, steps, lr, lam):
    """The paper's Algorithm 1 and Eq. 3-5, on concatenated gradients with torch.autograd, nothing shared with core."""
    theta = list(task.trainable().values())
    for step in range(steps):
        batch = task.batch("repair", step)
        L_f, L_r = task.forget(batch), task.retain(batch)
        g_f = torch.cat([g.reshape(-1) for g in torch.autograd.grad(L_f, theta)])
        g_o = torch.cat([g.reshape(-1) for g in torch.autograd.grad(L_r - lam * task.forget(batch), theta)])
        v = max(0.0, float(g_o @ g_f / (g_f @ g_f)))
        g = g_o - v * g_f
        with torch.no_grad():
            for p, part in zip(theta, g.split([p.numel() for p in theta]), strict=True):
                p -= lr * part.view_as(p)


@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_default_is_algorithm_1(toy, lam):
    ours, reference = toy(dtype=torch.float64), toy(dtype=torch.float64)
    records = run(ours, Repair(steps=40, lr=0.1, lam=lam))
    algorithm_1(reference, 40, 0.1, lam)
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, reference.model.get_parameter(name), rtol=1e-10, atol=1e-12)
    assert lam == 1 or any(r["bit"] for r in records)
    for r in records:
        assert r["c"] >= lam
        assert r["bit"] == (r["c"] > lam)


def test_defaults_are_the_paper():
    k = Repair()
    assert (k.objective, k.constraint, k.projection, k.optimizer) == ("ascent", "forget", "on", "sgd")
    assert (k.margin, k.ridge, k.forget_ceiling, k.max_grad_norm) == (0, 0, None, None)


def updates_and_constraints(task, knobs):
    """(record, applied descent direction, gradient of the constrained loss before the step), flat, step by step."""
    constrained = task.contrast if knobs.constraint == "contrast" else task.forget
    before = weights(task)
    for record, _ in repair(task, knobs):
        after = weights(task)
        task.model.load_state_dict(before)
        g_f = gradient(task, constrained, task.batch("repair", record["step"]), task.trainable())
        task.model.load_state_dict(after)
        yield record, flat({name: before[name] - after[name] for name in task.trainable()}), flat(g_f)
        before = after


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paper", {}),
        ("redirect", {}),
        ("contrast", {}),
        ("redirect-contrast", {"optimizer": "sgd"}),
        ("after", {}),
        ("contrast-after", {}),
    ],
)
def test_no_step_lowers_the_constrained_loss(toy, settings, name, changes):
    knobs, bitten = settings(name, steps=40, lam=0.01, **changes), 0
    for record, u, g_f in updates_and_constraints(toy(dtype=torch.float64), knobs):
        assert u @ g_f <= 1e-12 * u.norm() * g_f.norm()
        bitten += record["bit"]
    assert bitten


def test_projecting_adams_gradient_does_not_bind_adams_update(toy, settings):
    """Why the projection after preconditioning exists."""
    steps = updates_and_constraints(toy(dtype=torch.float64), settings("adamw", steps=40, lam=0.01))
    assert any(u @ g_f > 1e-3 * u.norm() * g_f.norm() for _, u, g_f in steps)


def test_with_sgd_both_places_of_the_projection_agree(toy, settings):
    on, after = toy(dtype=torch.float64), toy(dtype=torch.float64)
    run(on, settings("paper"))
    run(after, settings("paper", projection="after-preconditioning"))
    torch.testing.assert_close(flat(weights(on)), flat(weights(after)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "sign"), [("redirect-off", 1), ("contrast-off", -1)])
def test_without_projection_a_step_is_plain_descent_on_the_objective(toy, settings, name, sign):
    ours, other = toy(dtype=torch.float64), toy(dtype=torch.float64)
    run(ours, settings(name, steps=1))
    pull = other.redirect if sign > 0 else other.forget

    def L_o(batch):
        return other.retain(batch) + 0.2 * sign * pull(batch)

    g = gradient(other, L_o, other.batch("repair", 0), other.trainable())
    for key, p in other.trainable().items():
        torch.testing.assert_close(ours.trainable()[key].data, p.data - 0.05 * g[key], rtol=1e-12, atol=1e-14)


def test_margin_and_ridge_follow_the_released_code(toy, settings):
    for r in run(toy(), settings("released", steps=40, lam=0.01)):
        assert r["c"] == 0.01 or r["c"] >= 0.51


@pytest.mark.parametrize(
    ("name", "passes"),
    [("paper", 2), ("after", 2), ("redirect", 3), ("redirect-off", 2), ("contrast", 4), ("contrast-off", 2)],
)
def test_backward_passes_per_step_are_one_a_graph(toy, settings, name, passes):
    task = toy()
    run(task, settings(name))
    assert task.backwards == 6 * passes


def test_micro_batches_change_nothing(toy, knobs):
    """Uneven ones, in every setting, with a ceiling that is exceeded: every decision is the whole batch's."""
    knobs = dataclasses.replace(knobs, steps=12, forget_ceiling=3.0)
    whole, parts = toy(dtype=torch.float64), toy(dtype=torch.float64, sizes=(3, 1, 2, 2))
    for one, two in zip(run(whole, knobs), run(parts, knobs), strict=True):
        assert two == pytest.approx(one, rel=1e-9, abs=1e-12, nan_ok=True)
    torch.testing.assert_close(flat(weights(parts)), flat(weights(whole)), rtol=1e-10, atol=1e-12)


def test_a_constraint_that_rests_costs_no_backward_pass(toy, settings):
    task = toy()
    run(task, settings("resting", release_at=-100.0, steps=2))
    assert task.backwards == 2 * 2  # what is kept, and the redirect


def test_a_failed_gradient_is_left_in_no_parameter(toy):
    task = toy(sizes=(5, 3))
    theta, batch = task.trainable(), task.batch("test", 0)

    def broken(part):
        return task.forget(part) / (0 if len(part["forget"]) == 3 else 1)

    with pytest.raises(FloatingPointError, match="the broken loss is inf"):
        differentiate(task, {"broken": Term(broken)}, batch, theta)
    assert task.backwards == 2
    assert all(p.grad is None for p in task.model.parameters())


def test_nothing_is_projected_before_its_first_step(toy):
    records = run(toy(), Repair(steps=20, lr=0.05, lam=0.0, project_from=8))
    assert not any(r["bit"] or r["c"] for r in records[:8])
    assert any(r["bit"] for r in records[8:])


def test_the_projection_rests_once_the_constraint_loss_is_high_enough(toy, settings):
    changes = {"steps": 60, "lam": 0.2}
    records = run(toy(), settings("resting", release_at=-1.0, **changes))
    at_work = [r["loss_f"] < -1 for r in records]
    assert any(at_work)
    assert not all(at_work)
    assert all((r["c"] == 0 and not r["bit"]) or known for r, known in zip(records, at_work, strict=True))
    assert any(r["bit"] for r in records)
    tireless = run(toy(), settings("resting", release_at=None, **changes))
    assert any(r["bit"] and r["loss_f"] > -1 for r in tireless)


def test_preserving_keeps_the_original_answers(toy, settings):
    """Pulled elsewhere on the forget inputs, the model drifts less from its own answers to the retain inputs."""
    drift = {}
    for loss in ("original", "data"):
        task = toy()
        run(task, settings("preserving", retain_loss=loss, steps=40, projection="off"))
        drift[loss] = task.preserve(task.batch("exam", 0)).item()
    assert 0 < drift["original"] < 0.5 * drift["data"]


@pytest.mark.parametrize("name", ["paper", "contrast"])
def test_above_the_ceiling_ascent_stops_and_projection_stays(toy, settings, name):
    knobs = settings(name, steps=80, lr=0.2, lam=1.0, forget_ceiling=4.0)
    free, capped = run(toy(), dataclasses.replace(knobs, forget_ceiling=None)), run(toy(), knobs)
    over = [r for r in capped if r["ceiling"]]
    assert over == [r for r in capped if r["loss_f"] > 4.0]
    assert not any(r["ceiling"] for r in free)
    assert all(r["loss_o"] == pytest.approx(r["loss_r"]) for r in over)  # no ascent
    assert any(r["bit"] for r in over)  # still projecting
    assert max(r["loss_f"] for r in free) > 2 * max(r["loss_f"] for r in capped)


def test_clipping_bounds_the_step(toy, settings):
    task = toy()
    before = flat(weights(task))
    run(task, settings("paper", max_grad_norm=1e-3, lr=1.0, steps=1))
    assert (flat(weights(task)) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_learning_rate_schedules():
    linear = Repair(steps=10, lr=1.0, schedule="linear", warmup_steps=2)
    assert [learning_rate(linear, k) for k in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    cosine = Repair(steps=4, lr=2.0, schedule="cosine")
    assert [learning_rate(cosine, k) for k in (0, 2)] == pytest.approx([2.0, 1.0])
    assert learning_rate(Repair(steps=4, lr=2.0), 3) == 2.0
    assert learning_rate(Repair(steps=2, lr=1.0, warmup_steps=9), 1) == pytest.approx(2 / 9)
    steps = Repair(steps=8, lr=1.0, schedule="multistep", milestones=(0.5, 0.75))
    assert [learning_rate(steps, k) for k in (0, 3, 4, 5, 6)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_ascent_rests_with_the_projection_once_the_forget_loss_is_there(toy, settings):
    """Above release_at a step is a plain one on the retain loss, below it is Algorithm 1's."""
    for release_at, rests in ((0.0, True), (1e9, False)):
        task, plain = toy(), toy()
        records = [r for r, _ in repair(task, settings("paper", release_at=release_at, steps=2))]
        run(plain, settings("paper", steps=2, **({"projection": "off", "lam": 0.0} if rests else {})))
        for p, q in zip(task.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert all((r["c"] == 0) == rests for r in records)
