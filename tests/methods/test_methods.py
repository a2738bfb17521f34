"""Methods that need only a task's losses, each against its formula written out on a toy task."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.neggrad import NegGradPlus
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.descent import Descent
from erase_sd.methods.ascent import GradientAscent
from erase_sd.methods.erasediff import EraseDiff
from erase_sd.methods.finetune import FineTune
from erase_sd.methods.salun import SalUn
from tests.conftest import Alone


class Toy(Alone):
    """Linear 4 -> 3; on the forget inputs label 2 is to be forgotten for 0."""

    def __init__(self) -> None:
        self.seed = 0
        self.model = nn.Linear(4, 3)
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator(0, "init", p.ndim))

    def batch(self, purpose: str, step: int) -> dict[str, Tensor]:
        g = generator(0, purpose, step)
        return {"f": torch.randn(6, 4, generator=g) + 1, "r": torch.randn(6, 4, generator=g)}

    def _loss(self, x: Tensor, label: int) -> Tensor:
        return F.cross_entropy(self.model(x), torch.full((len(x),), label))

    def forget(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["f"], 2)

    def retain(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["r"], 1)

    def redirect(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["f"], 0)


def erasediff(multiplier: str, eta: float):
    """L_r + lam F with lam from the gradients as one vector each."""

    def formula(task: Toy, batch: dict[str, Tensor], step: int) -> Tensor:
        L_r, F_ = task.retain(batch), task.redirect(batch)
        g_r, g_F = (
            torch.cat([g.flatten() for g in torch.autograd.grad(L, task.model.parameters(), retain_graph=True)])
            for L in (L_r, F_)
        )
        scale = g_F @ g_F if multiplier == "bome" else g_F.norm() * g_r.norm()
        return L_r + torch.relu(eta - g_r @ g_F / scale) * F_

    return formula


STEPS = 5
COMMON = {"steps": STEPS, "lr": 0.1}
FORMULAS = [
    (FineTune(**COMMON), lambda t, b, k: t.retain(b)),
    (GradientAscent(**COMMON), lambda t, b, k: -t.forget(b)),
    (GradientAscent(**COMMON, alpha=0.7), lambda t, b, k: 0.7 * t.retain(b) - t.forget(b)),
    (NegGradPlus(**COMMON, alpha=0.7), lambda t, b, k: 0.7 * t.retain(b) - 0.3 * t.forget(b)),
    (SalUn(**COMMON, mask_fraction=1.0), lambda t, b, k: t.retain(b) + t.redirect(b)),
    (EraseDiff(**COMMON, eta=0.3), erasediff("bome", 0.3)),
    (EraseDiff(**COMMON, multiplier="cosine", eta=0.3), erasediff("cosine", 0.3)),
    (EraseDiff(**COMMON, multiplier="constant", lam=0.4), lambda t, b, k: t.retain(b) + 0.4 * t.redirect(b)),
]


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, Descent) else ""


@pytest.mark.parametrize(("method", "formula"), FORMULAS, ids=name)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_against_sgd_written_out(method: Descent, formula, momentum: float):
    """torch.optim is not used here: v = mu v + g + wd theta, theta -= lr v."""
    method = dataclasses.replace(method, momentum=momentum, weight_decay=0.01)
    task, plain = Toy(), Toy()
    records = [record for record, _ in method(task) if "step" in record]
    velocity: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = formula(plain, plain.batch("repair", step), step)
        assert records[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for (key, p), g in zip(
            plain.trainable().items(), torch.autograd.grad(loss, plain.model.parameters()), strict=True
        ):
            velocity[key] = momentum * velocity.get(key, 0) + g + 0.01 * p.detach()
            p.data -= 0.1 * velocity[key]
    for key, p in task.trainable().items():
        assert torch.allclose(p, plain.trainable()[key], atol=1e-6), key


def test_ascent_rests_above_its_ceiling():
    knobs = {"steps": 40, "lr": 0.3}
    free = [-record["loss"] for record, _ in GradientAscent(**knobs)(Toy())]
    capped = [-record["loss"] for record, _ in GradientAscent(**knobs, forget_ceiling=3.0)(Toy())]
    assert free[-1] > 10
    assert 2 < max(capped) <= 3  # a resting step counts as 0
    task = Toy()
    before = [p.detach().clone() for p in task.model.parameters()]
    assert len(list(GradientAscent(**knobs, forget_ceiling=0.01)(task))) == 40  # above it from the start
    assert all(torch.equal(x, p) for x, p in zip(before, task.model.parameters(), strict=True))


def test_erasediff_lowers_its_constraint_at_the_rate_it_promises():
    """BOME's barrier: <g, g_F> >= eta |g_F|^2 for the direction that is applied, with equality where lam > 0."""
    task, method = Toy(), EraseDiff(steps=1, lr=1e-3, eta=2.0)
    batch, before = task.batch("repair", 0), [p.detach().clone() for p in task.model.parameters()]
    g_F = torch.autograd.grad(task.redirect(batch), task.model.parameters())
    (record, _), *_ = method(task)
    moved = [(b - p.detach()) / 1e-3 for b, p in zip(before, task.model.parameters(), strict=True)]
    along, norm2 = (float(sum((a * g).sum() for a, g in zip(other, g_F, strict=True))) for other in (moved, g_F))
    assert record["lam"] > 0
    assert along == pytest.approx(2.0 * norm2, rel=1e-2)


def test_erasediff_where_nothing_is_left_to_erase():
    assert EraseDiff().weight(0.0, 0.0, 1.0) == 0.0
    assert EraseDiff(eta=0.1).weight(1.0, 2.0, 1.0) == 0.0


def salient(task: Toy, k: int) -> Tensor:
    """The k largest |mean gradient of L_f| of weight and bias together, as one flat mask."""
    grads = [
        torch.autograd.grad(task.forget(task.batch("sensitivity", b)), task.model.parameters()) for b in range(10)
    ]
    mean = torch.cat([torch.stack(g).mean(0).abs().flatten() for g in zip(*grads, strict=True)])
    return mean >= mean.sort(descending=True).values[k - 1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_salun_moves_the_salient_weights_only(optimizer: str):
    task = Toy()
    before = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    mask = salient(task, 6)
    for _ in SalUn(**COMMON, mask_fraction=0.4, weight_decay=0.1, optimizer=optimizer)(task):
        pass
    moved = torch.cat([p.detach().flatten() for p in task.model.parameters()]) != before
    assert torch.equal(moved, mask)
    assert mask.sum() == 6


def test_the_released_mask_leaks_weight_decay():
    task = Toy()
    before = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    for _ in SalUn(**COMMON, mask_fraction=0.4, weight_decay=0.1, mask_mode="gradient")(task):
        pass
    after = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    assert torch.allclose(after[~salient(Toy(), 6)], before[~salient(Toy(), 6)] * (1 - 0.1 * 0.1) ** STEPS)


class Guided(Toy):
    """Another loss under guidance than L_f, so that a mask says which one it was measured on."""

    def guided(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["r"], 1)

    def forget(self, batch: dict[str, Tensor]) -> Tensor:
        raise AssertionError("the released saliency is that of the guided loss")


def test_the_released_mask_is_measured_under_guidance():
    steps = list(SalUn(**COMMON, mask_fraction=0.4, mask_mode="released")(Guided()))
    assert steps[-1][0]["step"] == COMMON["steps"] - 1


@pytest.mark.parametrize("method", [*(m for m, _ in FORMULAS), SalUn(**COMMON, mask_fraction=0.4)], ids=name)
def test_resumed_equals_uninterrupted(method: Descent):
    method = dataclasses.replace(method, momentum=0.9)
    whole = Toy()
    yielded = len(list(method(whole)))
    for stop in range(1, yielded):
        cut, again = Toy(), Toy()
        *_, (_, state) = itertools.islice(method(cut), stop)
        state = {k: {n: x.clone() for n, x in v.items()} if isinstance(v, dict) else v for k, v in state.items()}
        again.model.load_state_dict(cut.model.state_dict())
        assert len(list(method(again, state))) == yielded - stop
        assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "knobs"), [(NegGradPlus, {"alpha": 1.5}), (SalUn, {"mask_fraction": 2.0}), (FineTune, {"lr": -1.0})]
)
def test_numbers_without_meaning(method: type, knobs: dict):
    with pytest.raises(UserError, match=f"--{next(iter(knobs))}"):
        method(**knobs)
