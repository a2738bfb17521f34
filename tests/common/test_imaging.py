"""Contact sheets show every image, pixelation and censoring hide, and broken images are told from sound ones."""

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.imaging import broken, censor, lettering, pixelate, sheet


def noise(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_sheet_keeps_every_pixel_at_whole_factors(scale: int) -> None:
    rows = [[noise(16, 3 * row + column) for column in range(3)] for row in range(2)]
    page = np.asarray(sheet(rows, ["before", "after"], ["a cat", "a dog in pencil style", "owl"], scale))
    for image in (image for row in rows for image in row):
        assert contains(page, np.asarray(image).repeat(scale, 0).repeat(scale, 1))


def contains(page: np.ndarray, part: np.ndarray) -> bool:
    high, wide = part.shape[:2]
    corners = np.argwhere((page == part[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + high, x : x + wide], part) for y, x in corners)


def test_sheet_of_ragged_rows_without_labels() -> None:
    page = sheet([[noise(8)], [noise(8), noise(16)]], scale=1.5)
    assert page.mode == "RGB"
    assert page.width > 48
    assert page.height > 48


def test_labels_take_room() -> None:
    plain, labelled = sheet([[noise()]]), sheet([[noise()]], ["before"], ["a cat"])
    assert labelled.width > plain.width
    assert labelled.height > plain.height


def test_pixelate_keeps_size_and_hides_detail() -> None:
    image = noise(64)
    hidden = pixelate(image, blocks=4)
    assert hidden.size == image.size
    assert len(set(hidden.get_flattened_data())) <= 16


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (8, 8)), "black"),
        (Image.new("L", (8, 8), 1), "black"),
        (Image.new("RGB", (8, 8), (200, 10, 10)), "constant"),
        (noise(8), None),
    ],
)
def test_broken(image: Image.Image, reason: str | None) -> None:
    assert broken(image) == reason


def test_censor_leaves_at_most_sixteen_colours_in_a_region_and_the_rest_alone() -> None:
    image = noise(64)
    before, after = np.asarray(image), np.asarray(censor(image, [(20, 10, 20, 30)]))
    assert len(np.unique(after[10:40, 20:40].reshape(-1, 3), axis=0)) <= 16
    outside = np.ones((64, 64), dtype=bool)
    outside[7:43, 18:42] = False  # a tenth of the size around the box
    assert (after == before).all(-1)[outside].all()
    assert (after != before).any(-1)[7:43, 18:42].mean() > 0.9
    assert np.array_equal(np.asarray(image), before)  # a copy was changed


@pytest.mark.parametrize("box", [(-10, -10, 5, 5), (70, 0, 9, 9), (3, 3, 0, 0)])
def test_censor_ignores_what_is_not_in_the_image(box: tuple[int, ...]) -> None:
    assert np.array_equal(np.asarray(censor(noise(), [box])), np.asarray(noise()))


def test_censor_cuts_off_what_sticks_out_and_hides_all_of_overlapping_boxes() -> None:
    hidden = np.asarray(censor(noise(), [(-5, -5, 100, 100), (4, 4, 8, 8)]))
    assert len(np.unique(hidden.reshape(-1, 3), axis=0)) <= 32


@pytest.mark.parametrize("letter", "é№“…ßя")
def test_labels_have_the_letters_of_prompts(letter: str) -> None:
    drawn, missing = (lettering(20).getmask(text) for text in (letter, "\U0010ffff"))
    assert bytes(drawn) != bytes(missing)
