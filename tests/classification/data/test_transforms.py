"""Crops, flips and shifts against plain slicing, and their independence of the batch."""

import pytest
import torch

from classification.data.transforms import AUGMENTS, augment, to_float
from erase_sd.common.rng import generator


def images(n: int, side: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randint(1, 256, (n, channels, side, side), generator=generator(0, "pixels")).to(torch.uint8)


def numbers(rows) -> torch.Tensor:
    return torch.rand(5000, 3, generator=generator(7, "augment"))[list(rows)]


def all_outcomes(image: torch.Tensor, margin: int, mirrors: bool) -> list[torch.Tensor]:
    """Every image that a crop of the padded image, and a flip, can give."""
    channels, height, width = image.shape
    canvas = torch.zeros(channels, height + 2 * margin, width + 2 * margin, dtype=torch.uint8)
    canvas[:, margin : margin + height, margin : margin + width] = image
    offsets = range(2 * margin + 1)
    crops = [canvas[:, y : y + height, x : x + width] for y in offsets for x in offsets]
    return crops + [crop.flip(2) for crop in crops] if mirrors else crops


@pytest.mark.parametrize("kind", AUGMENTS)
def test_every_outcome_is_a_crop_and_all_occur_alike(kind):
    """Chi-square over all outcomes: 162 for crop-flip, 9 for shift, 2 for flip, 1 for none."""
    margin, mirrors = {"crop-flip": (4, True), "flip": (0, True), "shift": (1, False), "none": (0, False)}[kind]
    image = images(1)[0]
    n = 5000
    changed = augment(image.expand(n, -1, -1, -1), kind, numbers(range(n)))
    expected = torch.stack(all_outcomes(image, margin, mirrors))
    counts = torch.stack([(changed == outcome).flatten(1).all(1).sum() for outcome in expected]).double()
    assert counts.sum() == n
    chi2 = ((counts - n / len(expected)) ** 2 / (n / len(expected))).sum()
    freedom = len(expected) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", AUGMENTS)
def test_a_sample_changes_alike_in_any_batch(kind):
    pixels = images(12, side=10)
    whole = augment(pixels, kind, numbers(range(12)))
    for rows in ([0, 1, 2], [11, 4], [5]):
        assert torch.equal(augment(pixels[rows], kind, numbers(rows)), whole[rows])
    if kind != "none":
        assert not torch.equal(whole, pixels)


@pytest.mark.parametrize("kind", AUGMENTS)
def test_images_need_not_be_square_or_coloured(kind):
    pixels = images(4, channels=1)[..., :5]
    changed = augment(pixels, kind, numbers(range(4)))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8


def test_the_global_generator_and_the_input_stay_as_they_were():
    pixels = images(6)
    before, state = pixels.clone(), torch.get_rng_state()
    augment(pixels, "crop-flip", numbers(range(6)))
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch_stays_empty():
    assert augment(images(1)[:0], "crop-flip", torch.empty(0, 3)).shape == (0, 3, 8, 8)


def test_three_numbers_per_image():
    with pytest.raises(ValueError, match="3 images need three numbers each"):
        augment(images(3), "flip", numbers(range(2)))
    with pytest.raises(KeyError):
        augment(images(3), "rotate", numbers(range(3)))


def test_floats_are_in_0_1():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_float(levels).flatten() * 255, torch.arange(256.0))
    assert to_float(levels).aminmax() == (0, 1)
