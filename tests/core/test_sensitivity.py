"""Eq. 1-2 against finite differences."""

import math

import pytest
import torch
from torch import nn

from erase_sd.core.sensitivity import accumulate, connection_sensitivity, contrastive
from erase_sd.core.task import gradient
from tests.conftest import Alone


def last(steps):
    *_, result = steps
    return result


def masked_loss(task, batch, name, index, c):
    """L_f with weight `index` of one parameter multiplied by c: the left side of Eq. 1."""
    theta = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    theta[name].view(-1)[index] *= c
    outputs = torch.func.functional_call(task.model, theta, (batch["forget"],))
    return nn.functional.cross_entropy(outputs, torch.full((8,), 2)).item()


def test_gradient_equals_central_differences(toy):
    task = toy(dtype=torch.float64)
    batch, h = task.batch("test", 0), 1e-5
    g = gradient(task, task.forget, batch, task.trainable())
    for name, p in task.trainable().items():
        for i, x in enumerate(p.data.view(-1)):
            up, down = (masked_loss(task, batch, name, i, 1 + sign * h / float(x)) for sign in (1, -1))
            assert g[name].view(-1)[i].item() == pytest.approx((up - down) / (2 * h), abs=1e-8)


def test_sensitivity_is_the_derivative_of_the_loss_by_a_connections_mask(toy):
    task = toy(dtype=torch.float64)
    batch, h, theta = task.batch("test", 0), 1e-5, task.trainable()
    g = gradient(task, task.forget, batch, theta)
    s = connection_sensitivity(theta, g, "signed")
    for name in theta:
        for i in range(theta[name].numel()):
            slope = (masked_loss(task, batch, name, i, 1 + h) - masked_loss(task, batch, name, i, 1 - h)) / (2 * h)
            assert s[name].view(-1)[i].item() == pytest.approx(slope, abs=1e-8)


def test_sensitivity_of_a_linear_loss_is_the_loss_lost_by_cutting_the_connection():
    x, w = torch.tensor([2.0, -3.0, 5.0]), torch.tensor([0.5, 1.0, -0.25])
    s = connection_sensitivity({"w": w}, {"w": x}, "signed")["w"]
    for j in range(3):
        cut = w.clone()
        cut[j] = 0
        assert s[j].item() == pytest.approx((w @ x - cut @ x).item())


def test_abs_saliency_is_the_size_of_the_signed_one():
    theta, g = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-3.0, -4.0])}
    assert connection_sensitivity(theta, g)["w"].tolist() == [3.0, 8.0]
    assert connection_sensitivity(theta, g, "signed")["w"].tolist() == [-3.0, 8.0]


def test_gradient_hands_over_and_leaves_nothing_behind(toy):
    task = toy()
    gradient(task, task.forget, task.batch("test", 0), task.trainable())
    assert all(p.grad is None for p in task.model.parameters())


def test_gradient_is_zero_where_the_loss_does_not_depend_on_a_parameter(toy):
    task = toy()
    g = gradient(task, lambda batch: task.model[3].bias.sum(), task.batch("test", 0), task.trainable())
    assert not g["0.weight"].any()
    assert g["3.bias"].all()


def test_gradient_of_a_half_precision_parameter_is_fp32():
    model = nn.Linear(2, 1).bfloat16()

    task = Alone()
    task.model, x = model, torch.ones(1, 2, dtype=torch.bfloat16)
    g = gradient(task, lambda batch: model(batch).sum(), x, dict(model.named_parameters()))
    assert all(x.dtype == torch.float32 for x in g.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_names_the_parameter_that_is_not_finite(toy, bad):
    task = toy()

    def loss(batch):
        return task.model[3].bias.sum() * bad + task.model[0].weight.sum()

    with pytest.raises(FloatingPointError, match=r"3\.bias"):
        gradient(task, loss, task.batch("test", 0), task.trainable())
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize("each", [lambda g: g, torch.square, torch.abs])
def test_accumulate_averages_over_batches(toy, each):
    task = toy()
    params = task.trainable()
    batches = [gradient(task, task.forget, task.batch("sensitivity", b), params) for b in range(4)]
    mean = last(accumulate(task, task.forget, params, "sensitivity", range(4), each))
    for name in params:
        expected = torch.stack([each(g[name]) for g in batches]).mean(0)
        torch.testing.assert_close(mean[name], expected, rtol=1e-5, atol=1e-7)


def test_micro_batches_give_the_gradient_of_the_batch(toy):
    whole, parts = toy(), toy(sizes=(2, 2, 1, 3))
    one, two = (gradient(t, t.forget, t.batch("test", 0), t.trainable()) for t in (whole, parts))
    assert parts.backwards == 4
    for name, g in one.items():
        torch.testing.assert_close(two[name], g, rtol=1e-5, atol=1e-7)


def test_accumulate_reports_after_every_batch(toy):
    task = toy()
    assert sum(1 for _ in accumulate(task, task.forget, task.trainable(), "sensitivity", range(3))) == 3
    assert task.backwards == 3


def test_contrastive_prefers_what_only_the_forget_data_need():
    one = {"a": torch.ones(2), "b": torch.ones(1)}
    fisher_f, fisher_r = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([0.0, 6.0])}
    s = contrastive(one, one, fisher_f, fisher_r | {"b": torch.tensor([0.0])}, eps=0.1)
    assert s["a"].tolist() == pytest.approx([1 / 0.2, 1 / 6.2])
    assert s["b"].item() == 0
