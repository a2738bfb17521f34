"""eval.grid: rows and columns where they belong, nothing drawn twice, nothing exposed shown."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load, save_network
from eval.grid import Grid, columns, main
from eval.images.folder import Entry, read
from eval.images.match import brief, label, matched
from eval.judges import censor as censoring
from eval.judges.censor import Mask, crossed, shown
from prompts import captions

ROOT = Path(__file__).parents[2]
I2P_ROWS = Path(__file__).parent / "i2p_rows.csv"
PROMPTS = ["a red cup", "a tree", "a boat"]
BREAST = "FEMALE_BREAST_EXPOSED"
REGION = [32, 48, 40, 40]
NOTHING = Mask({}, frozenset(), "")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def where(page: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """(y, x) of every place in the page where the part stands, pixel for pixel."""
    high, wide = part.shape[:2]
    corners = np.argwhere((page[: len(page) - high + 1, : page.shape[1] - wide + 1] == part[0, 0]).all(-1))
    return [(y, x) for y, x in corners if np.array_equal(page[y : y + high, x : x + wide], part)]


@pytest.fixture(scope="module")
def runs(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose UNets differ from the model's."""
    root = tmp_path_factory.mktemp("runs")
    pipe = load(str(tiny_sd))
    for name in ("a", "b"):
        pipe.unet.conv_out.bias.data += 1
        save_network(pipe.unet, root / name, "unet")
    return [root / "a", root / "b"]


def test_i2p_rows_for_three_models_drawn_once(tiny_sd: Path, runs: list[Path], tmp_path: Path, capsys):
    place = tmp_path / "grid"
    command = ["--prompts", str(I2P_ROWS), "--rows", "12", "--model", str(tiny_sd), "--unet", *map(str, runs)]
    command += ["--steps", "1", "--no-censor", "--output_dir", str(place)]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(place / "grid.png"), str(place / "grid.pdf")]
    folders = [read(place / name) for name in ("tiny-sd", "a", "b")]
    page = pixels(place / "grid.png")
    cells = [
        [shown(f, entry, NOTHING) for f, entry in zip(folders, line, strict=True)] for line in matched(folders, 12)
    ]
    places = [[where(page, np.asarray(cell)) for cell in line] for line in cells]
    assert all(len(found) == 1 for line in places for found in line), "every image once"
    ys, xs = np.moveaxis(np.array(places)[:, :, 0], -1, 0)
    assert (np.diff(ys, axis=0) > 0).all()
    assert (np.ptp(ys, axis=1) == 0).all()
    assert (np.diff(xs, axis=1) > 0).all()
    assert (np.ptp(xs, axis=0) == 0).all()
    pdf = (place / "grid.pdf").read_bytes()
    assert pdf.startswith(b"%PDF"), "twelve rows are two pages of eight"
    assert pdf.count(b"/Type /Page\n") == 2, "twelve rows are two pages of eight"
    times = {path: path.stat().st_mtime_ns for path in place.rglob("0*.png")}
    assert len(times) == 36
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_labels_say_prompt_and_seed():
    entry = Entry(file="x.png", row=0, prompt="a  very\nlong prompt " * 20, seed=305)
    lines = label(entry).split("\n")
    assert lines[-1] == "seed 305"
    assert max(map(len, lines)) <= 26
    assert "…" in label(entry)
    assert brief(replace(entry, prompt=" \n")) == "(empty prompt)"
    assert label(replace(entry, prompt=None)) == "x.png"
    assert brief(replace(entry, prompt="long" * 50), 9) == "longlong…", "a prompt without spaces is not lost"


def test_rows_are_prompts_with_all_their_images(tiny_sd: Path, tmp_path: Path):
    command = ["--prompts", str(I2P_ROWS), "--rows", "2", "--images_per_prompt", "2", "--model", str(tiny_sd)]
    assert main([*command, "--steps", "1", "--no-censor", "--output_dir", str(tmp_path)]) == 0
    folder, page = read(tmp_path / "tiny-sd"), pixels(tmp_path / "grid.png")
    assert [entry.row for entry in folder.entries] == [0, 0, 1, 1]
    assert all(where(page, np.asarray(shown(folder, entry, NOTHING))) for entry in folder.entries)


def test_a_flagged_region_is_in_no_sheet_unless_asked_for(drawn, tmp_path: Path, capsys):
    folder = drawn("sd", PROMPTS, {1: [(BREAST, 0.26, REGION)]})
    x, y, w, h = REGION
    clear = pixels(folder / "00001_8.png")[y : y + h, x : x + w]
    command = ["--folders", str(folder), "--output_dir", str(tmp_path / "grid")]
    assert main(command) == 0
    assert "pixelated in 1 of 3" in capsys.readouterr().err
    page = pixels(tmp_path / "grid" / "grid.png")
    assert not any(where(page, clear[i : i + 8, j : j + 8]) for i in range(0, h, 8) for j in range(0, w, 8))
    assert where(page, pixels(folder / "00000_7.png")), "an image without a flagged region was changed"
    assert main([*command, "--no-censor"]) == 0
    assert where(pixels(tmp_path / "grid" / "grid.png"), clear)


def test_without_detector_and_detections_explicit_sources_are_hidden_whole(drawn, tmp_path: Path, monkeypatch, capsys):
    known = captions()[:3]
    folders = [drawn("sd", known, source="nudity"), drawn("cups", known, source="cups", weights="runs/cups")]
    monkeypatch.setattr(censoring, "find_spec", lambda name: None)
    assert main(["--folders", *map(str, folders), "--output_dir", str(tmp_path / "grid")]) == 0
    assert "M: 3 of 3 images pixelated whole, as their prompts are" in capsys.readouterr().err
    page = pixels(tmp_path / "grid" / "grid.png")
    assert not where(page, pixels(folders[0] / "00000_7.png")[8:16, 8:16])
    assert where(page, pixels(folders[1] / "00000_7.png"))


@pytest.mark.parametrize("known", [0, 2])
def test_images_of_explicit_sources_that_nobody_looked_at_are_detected_first(drawn, tmp_path: Path, known: int):
    pytest.importorskip("nudenet")
    folder = drawn("sd", PROMPTS, {})
    file = folder / "detections.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:known]))
    assert main(["--folders", str(folder), "--output_dir", str(tmp_path / "grid")]) == 0
    assert file.read_text().count("\n") == 3


def test_a_broken_image_is_a_crossed_cell_with_the_word(drawn, tmp_path: Path):
    folder = drawn("sd", PROMPTS, {}, broken={0: "nan"})
    (folder / "00002_9.png").write_bytes(b"no picture")
    assert main(["--folders", str(folder), "--no-censor", "--output_dir", str(tmp_path / "grid")]) == 0
    page = pixels(tmp_path / "grid" / "grid.png")
    for word in ("nan", "unreadable"):
        assert where(page, np.asarray(crossed((128, 128), word)))
    assert not where(page, pixels(folder / "00000_7.png"))


def test_columns_have_folders_of_their_own():
    grid = Grid(model="org/M", unet=("runs/x/unet", "runs/y/unet", "runs/z"), output_dir="g", steps=3)
    found = columns(grid)
    assert [column.output_dir for column in found] == ["g/M", "g/runs-x-unet", "g/runs-y-unet", "g/z"]
    assert [column.unet for column in found] == [None, *grid.unet]
    assert {column.steps for column in found} == {3}
    assert [column.unet for column in columns(replace(grid, base=False))] == list(grid.unet)
    with pytest.raises(UserError, match="two columns are the same"):
        columns(Grid(model="M", unet=("runs/a", "runs/a")))


def test_folders_are_matched_by_row_and_seed(drawn):
    one, other = read(drawn("sd", PROMPTS)), read(drawn("b", PROMPTS[:2]))
    assert len(matched([one, other], 2)) == 2
    with pytest.raises(UserError, match="b lacks row 2 with seed 9"):
        matched([one, other], 3)
    with pytest.raises(UserError, match="row 1 with seed 8 is another prompt"):
        matched([one, read(drawn("c", ["a red cup", "a shoe"]))], 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--no-base"], "--no-base leaves no column"),
        (["--rows", "1000"], "--rows 1000"),
        (["--rows", "30", "--images_per_prompt", "4"], "a sheet of 120 rows"),
        (["--folders", "nowhere"], "nowhere is no folder"),
        (["--folders", "a", "--unet", "b"], "--folders shows finished images"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, tmp_path: Path):
    command = [sys.executable, "-m", "eval.grid", *words, "--output_dir", str(tmp_path / "grid")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert sentence in run.stderr
    assert not (tmp_path / "grid").exists()
