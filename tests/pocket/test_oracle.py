"""The judge: small, and not taken in by pictures that show nothing."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from erase_sd.common.rng import generator
from erase_sd.pocket.oracle import LABELS, OTHER, WEIGHTS, Oracle, load, name, to_tensor
from erase_sd.pocket.world import BACKGROUNDS


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return load()


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noise(n: int, spread: float, cell: int = 1) -> list[Image.Image]:
    """Normal noise around grey in cells of so many pixels."""
    rng = np.random.default_rng(0)
    cells = 127 + spread * rng.standard_normal((n, 32 // cell, 32 // cell, 3))
    return [picture(x) for x in cells.repeat(cell, 1).repeat(cell, 2)]


def solid(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.new("RGB", (32, 32), tuple(map(int, rng.integers(0, 256, 3)))) for _ in range(n)]


def blurred(n: int) -> list[Image.Image]:
    """Blobs of colour with nothing left of any outline."""
    rng = np.random.default_rng(2)
    return [picture(x).filter(ImageFilter.GaussianBlur(7)) for x in rng.integers(0, 256, (n, 32, 32, 3))]


NOTHING = {
    "black": [Image.new("RGB", (32, 32))],
    "white": [Image.new("RGB", (32, 32), "white")],
    "solid": solid(100),
    "noise": noise(100, 60),
    "strong noise": noise(100, 200),
    "coarse noise": noise(100, 80, 4),
    "blurred": blurred(100),
}


def test_it_is_small() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000


@pytest.mark.parametrize("images", NOTHING.values(), ids=NOTHING)
def test_nothing_is_no_object(oracle: Oracle, images: list[Image.Image]) -> None:
    found = [answer["object"] for answer in name(oracle, images)]
    assert found.count(OTHER) >= 0.98 * len(found), sorted(set(found))


def test_black_is_no_style_either(oracle: Oracle) -> None:
    assert name(oracle, NOTHING["black"])[0]["style"] == OTHER


def test_answers_do_not_depend_on_the_batch_or_the_size_of_the_picture(oracle: Oracle) -> None:
    images = noise(6, 60) + solid(6)
    large = [image.resize((64, 64), Image.Resampling.NEAREST) for image in images]
    assert name(oracle, images) == name(oracle, images, batch_size=1) == name(oracle, large)
    assert name(oracle, []) == []


def test_pictures_become_numbers_between_minus_one_and_one() -> None:
    x = to_tensor([Image.new("RGB", (32, 32), (0, 127, 255)), Image.new("L", (48, 64), 255)])
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1, -1 / 255, 1]), atol=1e-6, rtol=0)
    assert (x[1] == 1).all()


def test_every_kind_has_a_class_for_nothing(oracle: Oracle) -> None:
    logits = oracle(torch.randn(2, 3, 32, 32, generator=generator(0, "x")))
    assert {kind: values.shape[1] for kind, values in logits.items()} == {"object": 21, "style": 5, "background": 9}
    assert all(names[-1] == OTHER for names in LABELS.values())
    assert len(LABELS["background"]) == len(BACKGROUNDS) + 1
