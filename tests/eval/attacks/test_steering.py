"""Latents handed over: image-to-image, inpainting and completion on every family."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from erase_sd.common.errors import UserError
from erase_sd.models.families import family
from eval.attacks import attack
from eval.attacks.image_to_image import ImageToImage, skipped
from eval.attacks.inpainting import mask
from eval.attacks.steering import ddim, memoryless, noised_to, steered
from tests.eval.attacks.conftest import TARGETS, bright

FAMILIES = ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"]


@pytest.mark.parametrize("model", FAMILIES)
def test_handing_over_changes_nothing_between_equal_models(model: str, toys: Callable, make_setup: Callable):
    """The original's first steps, finished by itself, are the picture that it draws alone, whatever the layout."""
    pipe = toys(model)
    setup = make_setup(pipe)
    alone = steered(setup, pipe, TARGETS, lambda done, t, z: z)
    finding = attack("completion", given={"first_steps": (1, 3)}).attempt(setup, None, TARGETS)
    assert [f.tries for f in finding] == [{"after 1 steps": shown, "after 3 steps": shown} for shown in bright(alone)]


@pytest.mark.parametrize("model", FAMILIES)
def test_latents_are_seen_and_replaced_as_pictures(model: str, toys: Callable, make_setup: Callable):
    pipe = toys(model)
    setup = make_setup(pipe)
    channels = pipe.vae.config.latent_channels
    wanted = torch.randn(2, channels, 8, 8)
    seen = []

    def put(done: int, t: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor:
        seen.append((done, t is None, tuple(z.shape)))
        return wanted if t is None else z

    images = steered(setup, pipe, TARGETS, put)
    assert seen == [(i, i == 4, tuple(wanted.shape)) for i in (1, 2, 3, 4)]
    config = pipe.vae.config
    with torch.no_grad():
        z = wanted / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        decoded = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="np")
    found = np.stack([np.asarray(image) / 255 for image in images])
    np.testing.assert_allclose(found, decoded, atol=1 / 250)


def test_sampling_can_end_early(make_setup: Callable):
    setup, seen = make_setup(), []

    def count(done: int, t: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor:
        seen.append(done)
        return z

    steered(setup, setup.pipe, TARGETS, count, stop_after=2)
    assert seen == [1, 2]


def test_the_pipelines_own_scheduler_stays(make_setup: Callable):
    pipe = make_setup().pipe
    before = pipe.scheduler
    assert type(memoryless(pipe).scheduler).__name__ == "DDIMScheduler"
    assert pipe.scheduler is before


def test_ddim_does_not_clip_what_a_stored_scheduler_says_nothing_of(make_setup: Callable):
    pipe = make_setup().pipe
    assert ddim(pipe).config.clip_sample is False
    assert ddim(pipe).config.steps_offset == 1


def test_at_the_end_no_noise_is_left(make_setup: Callable):
    pipe = make_setup().pipe
    z, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(noised_to(pipe, z, noise, None), z)
    a = ddim(pipe).alphas_cumprod[500]
    torch.testing.assert_close(noised_to(pipe, z, noise, torch.tensor(500)), a.sqrt() * z + (1 - a).sqrt() * noise)


def test_strength_is_the_share_of_steps_that_the_model_draws():
    assert [skipped(20, s) for s in (0.6, 0.8, 0.9)] == [8, 4, 2]
    assert skipped(50, 0.8) == 10
    assert skipped(4, 0.1) == 3  # one step is always left
    assert skipped(4, 0.99) == 1


@pytest.mark.parametrize("strength", [0.0, 1.0, -2.0])
def test_a_strength_outside_its_range_is_refused(strength: float):
    with pytest.raises(UserError, match=r"outside \(0, 1\)"):
        ImageToImage(strengths=(strength,))


def test_the_less_is_left_to_the_model_the_nearer_its_picture_is_to_the_reference(make_setup: Callable):
    setup = make_setup()
    setup = replace(setup, sampling=replace(setup.sampling, steps=10))
    z = setup.reference(TARGETS)
    distances = []
    for strength in (0.1, 0.9):
        ends = []

        def watch(done: int, t: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
            start = skipped(10, strength)  # noqa: B023
            ends.append(latents)  # noqa: B023
            return noised_to(setup.pipe, z, torch.zeros_like(z), t) if done == start else latents

        steered(setup, setup.pipe, TARGETS, watch)
        distances.append(float((ends[-1] - z).square().mean()))
    assert distances[0] < distances[1]


def test_the_mask_is_the_middle_half_of_each_side():
    hidden = mask(torch.zeros(1, 4, 8, 8), 0.5)
    assert hidden.sum() == 16
    assert hidden[2:6, 2:6].all()


def test_outside_the_mask_the_reference_picture_is_left(make_setup: Callable):
    setup, ends = make_setup(), []
    whole = family(setup.pipe).unpacked
    inpainting = attack("inpainting")
    pipe = setup.pipe
    decode = pipe.vae.decode

    def caught(z: torch.Tensor, *given: object, **named: object) -> object:
        ends.append(whole(z))
        return decode(z, *given, **named)

    pipe.vae.decode = caught
    inpainting.attempt(setup, inpainting.prepare(setup), TARGETS)
    z = ends[-1] * pipe.vae.config.scaling_factor
    hidden = mask(z, 0.5)
    torch.testing.assert_close(z[:, :, ~hidden], setup.reference(TARGETS)[:, :, ~hidden], atol=1e-5, rtol=1e-5)
    assert (z[:, :, hidden] - setup.reference(TARGETS)[:, :, hidden]).abs().max() > 0.01
