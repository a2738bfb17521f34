"""Folders of images: by manifest or by file name, with every kind of file that is no image."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from eval.images.folder import Entry, picture, read, too_many_broken, warn_if_broken


def noise(path: Path, size: int = 16) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


def bomb(path: Path, side: int = 60_000) -> Path:
    """A PNG whose header claims gigapixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0")]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    return path


def test_any_folder_of_images(tmp_path: Path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        noise(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    folder = read(tmp_path)
    assert [entry.file for entry in folder.entries] == ["a.jpg", "b.png"]
    assert folder.generation == {}
    assert folder.label == tmp_path.name
    assert folder.entries[0].prompt is None


def test_a_manifest_decides_order_and_content(tmp_path: Path):
    for name in ("00000_7.png", "00001_8.png", "stray.png"):
        noise(tmp_path / name)
    lines = [{"file": "00001_8.png", "row": 1, "prompt": "a\u2028b", "seed": 8}, {"file": "00000_7.png", "row": 0}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "manifest.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "generation.json").write_text('{"model": "x/sd", "weights": "runs/cat"}')
    folder = read(tmp_path)
    assert [entry.file for entry in folder.entries] == ["00001_8.png", "00000_7.png"]
    assert folder.entries[0].prompt == "a\u2028b"
    assert folder.label == "cat"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: p.write_bytes(b""), "unreadable"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\ngarbage"), "unreadable"),
        (lambda p: p.write_bytes(noise(p).read_bytes()[:300]), "unreadable"),
        (bomb, "unreadable"),
        (lambda p: None, "unreadable"),  # listed, but not there
        (lambda p: Image.new("RGB", (8, 8)).save(p), "black"),
        (lambda p: Image.new("L", (8, 8), 90).save(p), "constant"),
        (lambda p: noise(p), None),
    ],
)
def test_what_is_no_image_says_so(tmp_path: Path, make, why: str | None):
    make(tmp_path / "x.png")
    noise(tmp_path / "sound.png")
    image, reason = picture(read(tmp_path), Entry(file="x.png"))
    assert reason == why
    assert (image is None) == (why == "unreadable")


def test_a_photograph_is_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10), "red").save(tmp_path / "x.jpg", exif=exif)
    assert picture(read(tmp_path), Entry(file="x.jpg"))[0].size == (10, 20)


def test_the_manifest_knows_nan_from_black(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert picture(read(tmp_path), Entry(file="x.png", broken="nan"))[1] == "nan"


def test_odd_but_sound_images_are_rgb(tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8), "CMYK").save(
        tmp_path / "x.jpg"
    )
    image, why = picture(read(tmp_path), Entry(file="x.jpg"))
    assert image.mode == "RGB"
    assert why is None


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path):
    """Pillow alone clips them at 255: nearly every level would be white, and a detector finds nothing in white."""
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(levels).save(tmp_path / "x.png")
    image, why = picture(read(tmp_path), Entry(file="x.png"))
    assert why is None
    assert np.array_equal(np.asarray(image), np.stack([levels >> 8] * 3, -1))


def test_sixteen_bits_are_turned_upright_too(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(200, dtype=np.uint16).reshape(10, 20) * 300).save(tmp_path / "x.png", exif=exif)
    assert picture(read(tmp_path), Entry(file="x.png"))[0].size == (10, 20)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_without_a_white_are_unreadable(tmp_path: Path, mode: str):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 1000).convert(mode).save(tmp_path / "x.tiff")
    (tmp_path / "x.tiff").rename(tmp_path / "x.png")  # Pillow goes by the content
    assert picture(read(tmp_path), Entry(file="x.png")) == (None, "unreadable")


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda p: None, "is no folder"),
        (lambda p: p.mkdir(), "holds no images"),
        (lambda p: (p.mkdir(), (p / "generation.json").write_text("{")), "is not JSON"),
        (lambda p: (p.mkdir(), noise(p / "a.png"), (p / "manifest.jsonl").write_text("")), "manifest.jsonl, line 1"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, prepare, sentence: str):
    prepare(tmp_path / "images")
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "images")


def test_more_than_one_percent_broken_is_too_many():
    sound, bad = Entry(file="a.png"), Entry(file="b.png", broken="black")
    assert not too_many_broken([bad, *[sound] * 99])
    assert too_many_broken([bad, *[sound] * 98])


def test_a_warning_names_the_folder_and_the_first_broken_image(tmp_path: Path, capsys: pytest.CaptureFixture):
    entries = [Entry(file="a.png"), Entry(file="b.png", broken="nan"), Entry(file="c.png", broken="black")]
    assert warn_if_broken(entries, tmp_path)
    assert capsys.readouterr().err == (
        f"2 of 3 images of {tmp_path} are broken (b.png ...): do not trust these numbers\n"
    )


def test_sound_images_are_not_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert not warn_if_broken([Entry(file="a.png")], tmp_path)
    assert capsys.readouterr().err == ""
