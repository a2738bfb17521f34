"""Selective Amnesia against its loss written out: surrogate, replay, penalty of elastic weight consolidation."""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.methods.selective_amnesia import SelectiveAmnesia
from tests.conftest import Alone

B = 3


class Batch(NamedTuple):
    z_f: Tensor
    z_a: Tensor
    noise_f: Tensor
    c_f: Tensor
    z_r: Tensor
    noise_r: Tensor
    c_r: Tensor


class Toy(Alone):
    """A linear denoiser of vectors: noise is added, captions are added to the answer."""

    def __init__(self) -> None:
        self.model, self.settings, self.seed = nn.Linear(4, 4), SimpleNamespace(batch_size=B), 0
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator(0, "init", p.ndim))

    def batch(self, purpose: str, step: int) -> Batch:
        g = generator(0, purpose, step)
        return Batch(*(torch.randn(B, 4, generator=g) for _ in Batch._fields))

    def forget(self, b: Batch) -> Tensor:
        return mse_loss(self.model(b.z_f + b.noise_f) + b.c_f, b.noise_f)

    def retain(self, b: Batch) -> Tensor:
        return mse_loss(self.model(b.z_r + b.noise_r) + b.c_r, b.noise_r)


KNOBS = {"steps": 4, "lr": 1e-3, "gamma": 0.7, "lam": 2e-7, "fisher_batches": 5}


def flat(task: Toy) -> Tensor:
    return torch.cat([p.flatten() for p in task.model.parameters()])


def fisher(task: Toy) -> Tensor:
    """1000^2 B E[g^2] of the replay loss."""
    batches = [task.batch("fisher", i) for i in range(KNOBS["fisher_batches"])]
    grads = [torch.autograd.grad(task.retain(b), list(task.model.parameters())) for b in batches]
    return 1000**2 * B * torch.stack([torch.cat([x.flatten() for x in g]) ** 2 for g in grads]).mean(0)


def test_against_gradient_descent_on_the_whole_loss():
    task, plain = Toy(), Toy()
    records = [record for record, state in SelectiveAmnesia(**KNOBS)(task) if state]
    F, star = fisher(plain), flat(plain).detach()
    for step, record in enumerate(records):
        b = plain.batch("repair", step)
        surrogate = mse_loss(plain.model(b.z_a + b.noise_f) + b.c_f, b.noise_f)
        penalty = KNOBS["lam"] * (F * (flat(plain) - star) ** 2).sum()
        loss = surrogate + KNOBS["gamma"] * plain.retain(b) + penalty
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["penalty"] == pytest.approx(penalty.item(), rel=1e-3, abs=1e-12) and (
            step == 0 or penalty > 1e-6
        )
        for p, g in zip(
            plain.model.parameters(), torch.autograd.grad(loss, list(plain.model.parameters())), strict=True
        ):
            p.data -= KNOBS["lr"] * g
    assert len(records) == 4 and torch.allclose(flat(task), flat(plain), atol=1e-6)


def test_the_penalty_holds_what_the_replay_depends_on():
    """Without replay itself (gamma 0): distance from theta* in the metric of F."""
    moved = {}
    for lam in (0.0, 1e-6):
        task = Toy()
        F, star = fisher(task), flat(task).detach()
        *_, _ = SelectiveAmnesia(**KNOBS | {"steps": 300, "lam": lam, "gamma": 0.0})(task)
        moved[lam] = float((F * (flat(task).detach() - star) ** 2).sum())
    assert moved[1e-6] < 0.2 * moved[0.0]


def test_resumed_equals_uninterrupted():
    """The Fisher information and theta* are those of the first start, which the weights no longer tell."""
    whole, cut, again = Toy(), Toy(), Toy()
    method = SelectiveAmnesia(**KNOBS, momentum=0.9)
    *_, _ = method(whole)
    *_, (_, state) = itertools.islice(method(cut), KNOBS["fisher_batches"] + 2)
    state = {k: {n: x.clone() for n, x in v.items()} if isinstance(v, dict) else v for k, v in state.items()}
    again.model.load_state_dict(cut.model.state_dict())
    *_, _ = method(again, state)
    assert torch.equal(flat(again), flat(whole))


def test_a_penalty_has_to_be_measured():
    with pytest.raises(UserError, match="--fisher_batches 0"):
        SelectiveAmnesia(fisher_batches=0)
    SelectiveAmnesia(fisher_batches=0, lam=0.0)
