"""Re-initialisation touches the selected entries only and draws from the distribution it names."""

import pytest
import torch
from torch import nn

from erase_sd.common.rng import generator
from erase_sd.core.trim import INITS, reinitialise_


def weights(*shape):
    return {"w": nn.Parameter(torch.full(shape, 7.0))}


def masks(params, share=0.3):
    rng = generator(0, "mask")
    return {name: torch.rand(p.shape, generator=rng) < share for name, p in params.items()}


@pytest.mark.parametrize("init", INITS)
def test_only_the_selected_entries_change_and_the_count_says_so(init):
    params = {"conv": nn.Parameter(torch.full((8, 4, 3, 3), 7.0)), "bias": nn.Parameter(torch.full((8,), 7.0))}
    chosen = masks(params)
    changed = reinitialise_(params, chosen, init, seed=3)
    for name, p in params.items():
        assert torch.equal(p != 7, chosen[name])
        assert changed[name] == int(chosen[name].sum())


@pytest.mark.parametrize(
    ("init", "std", "bound"),
    [
        ("uniform", (3 * 72) ** -0.5, 72**-0.5),
        ("normal", (3 * 72) ** -0.5, 1.0),
        ("kaiming", (2 / 72) ** 0.5, (6 / 72) ** 0.5),
        ("truncated", 0.02, 2.0),
    ],
)
def test_draws_have_the_named_spread(init, std, bound):
    params = weights(2000, 8, 3, 3)  # fan_in 72
    reinitialise_(params, {"w": torch.ones(2000, 8, 3, 3, dtype=torch.bool)}, init, seed=0)
    w = params["w"].detach()
    assert w.std().item() == pytest.approx(std, rel=0.01)
    assert abs(w.mean().item()) < 0.01 * std * 3
    assert w.abs().max() <= bound


@pytest.mark.parametrize("init", ["uniform", "kaiming"])
def test_uniform_draws_pass_a_kolmogorov_test(init):
    params = weights(500, 72)
    reinitialise_(params, {"w": torch.ones(500, 72, dtype=torch.bool)}, init, seed=1)
    bound = {"uniform": 72**-0.5, "kaiming": (6 / 72) ** 0.5}[init]
    x = ((params["w"].detach().view(-1) / bound + 1) / 2).sort().values
    n = len(x)
    assert (x - torch.arange(1, n + 1) / n).abs().max() < 1.63 / n**0.5  # 1 % level


def test_biases_become_zero_whatever_the_init():
    params = {"b": nn.Parameter(torch.ones(5))}
    assert reinitialise_(params, {"b": torch.ones(5, dtype=torch.bool)}, "ones", 0) == {"b": 5}
    assert not params["b"].any()


def test_an_entry_that_keeps_its_value_is_not_counted():
    params = {"b": nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))}
    assert reinitialise_(params, {"b": torch.tensor([True, True, False])}, "uniform", 0) == {"b": 1}


def test_draws_depend_on_seed_and_name_not_on_other_parameters_or_the_global_state():
    def run(names, seed):
        torch.rand(len(names) + seed)  # moves the global generator, which must not matter
        params = {name: nn.Parameter(torch.zeros(6, 5)) for name in names}
        reinitialise_(params, {name: torch.ones(6, 5, dtype=torch.bool) for name in names}, "normal", seed)
        return params

    alone, together = run(["b"], 0)["b"], run(["a", "b", "c"], 0)
    assert torch.equal(alone, together["b"])
    assert not torch.equal(together["a"], together["b"])
    assert not torch.equal(alone, run(["b"], 1)["b"])


def test_masks_of_parameters_outside_the_scope_are_ignored():
    params = weights(3, 3)
    everything = {name: torch.ones(3, 3, dtype=torch.bool) for name in ("w", "norm.weight")}
    assert set(reinitialise_(params, everything, "zeros", 0)) == {"w"}


def test_half_precision_weights_keep_their_type():
    params = {"w": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    reinitialise_(params, {"w": torch.ones(4, 4, dtype=torch.bool)}, "uniform", 0)
    assert params["w"].dtype == torch.bfloat16
    assert (params["w"].abs() <= 0.5).all()
