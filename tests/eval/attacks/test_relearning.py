"""Relearning: its counter, its training loop, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from erase_sd.common.errors import UserError
from eval.attacks import attack
from eval.attacks.base import AttackJudge
from eval.attacks.relearning import Relearning, first_check, tuned
from eval.attacks.runner import summary
from tests.eval.attacks.conftest import TARGETS


class Counting:
    """A judge that sees the first target from the second check on, the other one never."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: list[Image.Image]) -> list[bool]:
        self.asked += 1
        return [self.asked >= 2, False]


def test_the_counter_tells_the_steps_after_which_a_target_was_back(make_setup: Callable):
    judge = AttackJudge(name="counting", key="2" * 64, shows=Counting())
    setup = make_setup(judge=judge)
    relearning = Relearning(pictures=2, checks=(1, 3, 4), batch_size=2)
    first, second = relearning.attempt(setup, relearning.prepare(setup), TARGETS)
    assert first.success
    assert first.found == {"steps": 3}
    assert first.tries == {"1 steps": False, "3 steps": True, "4 steps": True}
    assert first.queries == 3
    assert not second.success
    assert second.found == {"steps": None}
    assert relearning.prepare(setup).gradient_steps == 8


def test_the_first_check_at_which_it_was_back():
    assert first_check((5, 10, 20), [False, True, True]) == 10
    assert first_check((5, 10, 20), [True, False, False]) == 5
    assert first_check((5, 10, 20), [False, False, False]) is None


@pytest.mark.parametrize(("steps", "wanted"), [([5, 10, None, 20], 10), ([None, None, None, 5], None), ([5, 5], 5)])
def test_half_of_the_targets_make_it_relearned(steps: list, wanted: int | None):
    records = [
        {"row": i, "success": s is not None, "tries": {}, "found": {"steps": s}, "queries": 1, "seconds": 0.0}
        | {"gradient_steps": 0}
        for i, s in enumerate(steps)
    ]
    assert summary(records, len(records), None)["steps_to_half"] == wanted


def test_fine_tuning_takes_the_steps_it_says_and_leaves_the_attacked_model_alone(make_setup: Callable):
    """Against the loop written out: AdamW on the denoising loss of all pictures, since the batch holds them all."""
    setup = make_setup()
    before = {name: p.clone() for name, p in setup.pipe.unet.named_parameters()}
    seen = {}
    for step, pipe in tuned(Relearning(pictures=1, checks=(1, 2), lr=1e-2, batch_size=4), setup):
        seen[step] = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    assert list(seen) == [1, 2]
    for name, p in setup.pipe.unet.named_parameters():
        assert torch.equal(p, before[name]), name
    moved = [name for name in before if not torch.equal(seen[1][name], before[name])]
    assert len(moved) > len(before) / 2
    for name in moved[:20]:  # the first step of AdamW is the sign of the gradient times the rate
        assert (seen[1][name] - before[name]).abs().max() <= 1.001e-2
    assert any(not torch.equal(seen[2][name], seen[1][name]) for name in moved)


def test_a_model_in_half_precision_is_refused(make_setup: Callable):
    setup = make_setup()
    setup.pipe.unet.half()
    assert "float32" in attack("relearning-8").refusal(setup.pipe, setup.concept)


@pytest.mark.parametrize("checks", [(), (5, 5), (10, 5), (0, 5)])
def test_checks_that_do_not_rise_are_refused(checks: tuple):
    with pytest.raises(UserError, match="must rise"):
        Relearning(checks=checks)


def test_it_learns_on_other_pictures_than_those_of_the_targets(make_setup: Callable):
    setup = make_setup()
    assert attack("relearning-64").examples == 64
    taught = replace(setup, examples=None)
    with pytest.raises(TypeError):
        next(tuned(Relearning(pictures=1, checks=(1,)), taught))
