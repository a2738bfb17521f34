"""What a run leaves behind besides the weights."""

import numpy as np
from PIL import Image

from erase_sd.denoising.concept import Preview
from erase_sd.denoising.results import before_after


def noise(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)) for _ in range(n)]


def colours(image: Image.Image) -> int:
    return len(image.getcolors(1 << 20))


def test_only_the_concepts_own_pictures_are_pixelated() -> None:
    shown = Preview(["nude", "a cat"], noise(2), None)
    sheets = [before_after(shown, shown, hidden) for hidden in ((False, False), (True, False), (True, True))]
    none, one, both = map(colours, sheets)
    assert none > 1.9 * one > 10 * both
    left, right = (sheets[1].width // 2 - 40, sheets[1].width - 96)
    middle = sheets[1].height // 2 - 30
    assert colours(sheets[1].crop((left - 50, middle - 20, left, middle))) < 100
    assert colours(sheets[1].crop((right + 20, middle - 20, right + 70, middle))) > 500
