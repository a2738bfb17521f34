"""TINA: the DDIM relation against diffusers, and the fixed point of a linear network."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from eval.attacks import attack
from eval.attacks.steering import ddim
from eval.attacks.tina import coefficients, denoised, inverted, noise_of
from tests.eval.attacks.conftest import TARGETS

ALPHAS = [torch.tensor(a, dtype=torch.float64) for a in (0.999, 0.9, 0.6, 0.3, 0.05)]
TIMES = [100, 300, 600, 900]


def test_the_relation_is_that_of_ddim():
    """What DDIMScheduler makes of z_t goes back to z_t."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    z_t, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t = scheduler.timesteps[4]
    before = scheduler.step(eps, t, z_t).prev_sample
    c1, c2 = coefficients(scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 100])
    torch.testing.assert_close(c1 * before + c2 * eps, z_t, atol=1e-5, rtol=1e-5)


def linear(z: Tensor, t: int) -> Tensor:
    return 0.3 * z + 0.001 * t


def test_the_inversion_ends_at_the_fixed_point():
    """e is linear here: z_t = C1 z_(t-1) + C2 (k z_t + m) is solved by hand."""
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = z
    for i, t in enumerate(TIMES):
        c1, c2 = coefficients(ALPHAS[i + 1], ALPHAS[i])
        wanted = (c1 * wanted + c2 * 0.001 * t) / (1 - 0.3 * c2)
    found = inverted(z, linear, TIMES, ALPHAS, 400, 5e-3)
    plain = inverted(z, linear, TIMES, ALPHAS, 0, 5e-3)
    assert (found - wanted).abs().max() < 0.02
    assert (plain - wanted).abs().max() > 0.2


def test_from_a_fixed_point_ddim_goes_back_to_the_picture():
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = denoised(inverted(z, linear, TIMES, ALPHAS, 400, 5e-3), linear, TIMES, ALPHAS)
    plain = denoised(inverted(z, linear, TIMES, ALPHAS, 0, 5e-3), linear, TIMES, ALPHAS)
    assert (exact - z).abs().max() < 0.05
    assert (exact - z).abs().max() < (plain - z).abs().max() / 5


def test_pictures_of_a_batch_do_not_know_each_other():
    z = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    alphas = [a.float() for a in ALPHAS]
    both = inverted(z, linear, TIMES, alphas, 5, 1e-3)
    torch.testing.assert_close(both[:1], inverted(z[:1], linear, TIMES, alphas, 5, 1e-3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_is_read_from_whatever_the_network_predicts(make_setup: Callable, kind: str):
    pipe = make_setup().pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    scheduler = ddim(pipe)
    torch.manual_seed(0)
    z_0, eps, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), 400
    a = scheduler.alphas_cumprod
    z_t = a[t].sqrt() * z_0 + (1 - a[t]).sqrt() * eps
    answers = {"epsilon": eps, "sample": z_0, "v_prediction": a[t].sqrt() * eps - (1 - a[t]).sqrt() * z_0}

    class Known(torch.nn.Module):
        dtype = torch.float32

        def forward(self, *given: object, **named: object) -> object:
            return type("Output", (), {"sample": answers[kind]})

    pipe.unet = Known()
    torch.testing.assert_close(noise_of(pipe, {}, a)(z_t, t), eps, atol=1e-4, rtol=1e-4)


def test_a_picture_of_the_models_own_comes_back(make_setup: Callable):
    """The unerased model is handed a latent and draws it again, more nearly than plain inversion does."""
    setup = make_setup()
    setup = replace(setup, sampling=replace(setup.sampling, steps=6))
    search = attack("tina", given={"timesteps": 6, "steps": 5})
    finding = search.attempt(setup, search.prepare(setup), TARGETS)
    assert len(finding) == 2
    assert finding[0].gradient_steps == 30
    assert finding[0].queries == 1
