"""Ring-A-Bell: the concept vector and the genetic search, against cases solved by hand."""

from collections.abc import Callable
from itertools import pairwise

import torch

from erase_sd.common.rng import generator
from eval.attacks.ring_a_bell import concept_vector, crossed, distance, evolved, hidden_states, mutated, states_of


def test_the_concepts_vector_is_what_all_pairs_have_in_common():
    torch.manual_seed(0)
    v, negative = torch.randn(4, 3), torch.randn(5, 4, 3)
    noise = torch.randn(5, 4, 3)
    noise -= noise.mean(0)
    torch.testing.assert_close(concept_vector(negative + v + noise, negative), v, atol=1e-5, rtol=1e-5)


def test_the_distance_sums_squares_over_places_and_channels():
    states, wanted = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert distance(states, wanted).tolist() == [14.0]


def test_tokens_are_encoded_as_their_text_is(make_setup: Callable):
    pipe = make_setup().pipe
    tokens = pipe.tokenizer("a cat", add_special_tokens=False).input_ids
    torch.testing.assert_close(states_of(pipe, torch.tensor([tokens])), hidden_states(pipe, ["a cat"]))


def test_children_take_a_head_and_a_tail():
    parents = torch.stack([torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)])
    assert torch.equal(crossed(parents, 0.0, generator(0, "none")), parents)
    rows = crossed(parents, 1.0, generator(0, "all")).tolist()
    assert len(rows) == 6
    for row in rows:
        changes = sum(a != b for a, b in pairwise(row))
        assert changes <= 1


def test_a_mutation_replaces_one_token_of_a_share():
    population, allowed = torch.zeros(4000, 8, dtype=torch.long), torch.arange(100, 200)
    changed = mutated(population, 0.25, allowed, generator(0, "mutation"))
    replaced = (changed != population).sum(1)
    assert replaced.max() == 1
    assert abs(float((replaced == 1).float().mean()) - 0.25) < 0.03
    assert changed[changed != 0].min() >= 100


def test_the_search_finds_the_best_of_all_words():
    """Each place counts by itself here: brute force over them gives the best of 20^4."""
    wanted, allowed = torch.tensor([3, 14, 7, 19]), torch.arange(20)

    def fitness(population: torch.Tensor) -> torch.Tensor:
        return (population - wanted).abs().sum(1).float()

    rng = generator(0, "search")
    first = torch.randint(20, (100, 4), generator=rng)
    best = evolved(first, fitness, 60, 0.5, 0.25, allowed, rng)
    assert best.tolist() == wanted.tolist()
