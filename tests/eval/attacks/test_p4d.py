"""P4D: nearest tokens against brute force, the straight-through gradient, the layout of its prompts."""

from collections.abc import Callable

import torch

from eval.attacks import attack
from eval.attacks.p4d import _Prompt, layout, nearest, straight_through
from eval.attacks.soft_prompt import Vocabulary
from tests.eval.attacks.conftest import NEVER, TARGETS


def test_the_nearest_token_is_the_one_of_brute_force():
    torch.manual_seed(0)
    v, table = torch.randn(6, 5), torch.randn(40, 5) * torch.rand(40, 1)
    for vector, found in zip(v, nearest(v, table).tolist(), strict=True):
        cosines = [float(vector @ row / (vector.norm() * row.norm())) for row in table]
        assert found == max(range(40), key=lambda i: cosines[i])


def test_forward_is_a_token_and_the_gradient_is_the_soft_vectors():
    torch.manual_seed(0)
    v, table, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4), torch.randn(3, 4)
    used = straight_through(v, table)
    torch.testing.assert_close(used.detach(), table[nearest(v, table)])
    (used * weight).sum().backward()
    torch.testing.assert_close(v.grad, weight)


def test_one_free_token_before_every_three_of_the_prompt():
    assert layout(7, 3) == [True, False, False, False, True, False, False, False, True, False]


def test_a_prompt_holds_its_own_tokens_between_the_free_ones(make_setup: Callable):
    words = Vocabulary(make_setup().pipe)
    own = words.ids("abcd", 75)
    prompt = _Prompt(words, "abcd", free=16, every=3)
    free = torch.tensor([5, 6])
    assert prompt.tokens(free) == [5, *own[:3], 6, own[3]]
    torch.testing.assert_close(prompt.vectors(words.table[free]), words.table[[5, *own[:3], 6, own[3]]])
    assert _Prompt(words, "abcd", free=4, every=None).tokens(torch.tensor([1, 2, 3, 4])) == [1, 2, 3, 4]


def test_a_long_prompt_is_cut_to_what_the_encoder_reads(make_setup: Callable):
    words = Vocabulary(make_setup().pipe)
    prompt = _Prompt(words, "a" * 200, free=16, every=3)
    assert len(prompt.places) == words.room
    assert len(prompt.tokens(torch.zeros(prompt.free, dtype=torch.long))) == words.room


def test_pictures_are_drawn_at_the_end_and_in_between(make_setup: Callable):
    setup = make_setup(judge=NEVER)
    search = attack("p4d-k", given={"steps": 5, "picture_every": 2, "samples": 3})
    finding = search.attempt(setup, search.prepare(setup), TARGETS[:1])[0]
    assert finding.queries == 3  # after 2, 4 and 5 steps
    assert finding.gradient_steps == 15
