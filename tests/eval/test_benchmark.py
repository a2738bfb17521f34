"""The benchmark as a user runs it, at toy size: what it leaves, what it does again, and what it does not."""

import csv
import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load
from erase_sd.pocket import FOLDER
from erase_sd.pocket.prompt_sets import exam
from erase_sd.pocket.score import answers, scores
from eval import benchmark
from eval.benchmarking import suites
from eval.benchmarking.rows import rows
from eval.benchmarking.suites import ORIGINAL, Suite

FEW = {"steps": 1, "forget_images": 4, "retain_images": 6, "sample_steps": 2, "batch_size": 2}
SCISSORHANDS = suites.OURS | FEW | {"sensitivity_batches": 1, "anchor_pictures": False}
TOY = Suite(
    methods={
        "Ours": SCISSORHANDS | {"fraction": 0.2},
        "Lost": {"method": "ascent", "preset": "pocket"} | FEW | {"lr": 1e30},
    },
    concepts=("frog",),
    seeds=(0,),
    forget_pictures=3,
    retain_pictures=7,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "toy", TOY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The folder of a whole benchmark, of which one method is lost, its exit code, and what it said on stderr."""
    folder, said = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setitem(suites.SUITES, "toy", TOY)
        return folder, run(folder, "--keep"), said.getvalue()


def run(folder: Path, *more: str) -> int:
    return benchmark.main(["--suite", "toy", "--output_dir", str(folder), *more])


def results(folder: Path) -> dict[str, dict]:
    return {(x := json.loads(file.read_text()))["method"]: x for file in (folder / "rows").iterdir()}


def ages(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "rows").iterdir()}


def test_it_leaves_tables_and_small_rows(finished: tuple[Path, int, str]):
    folder, code, _ = finished
    assert code == 1  # one method is lost
    kept = {path.name for path in folder.iterdir()} - {".cache", ".lock"}
    assert kept == {"rows", "distances.json", "grid.png", *(f"leaderboard.{end}" for end in ("csv", "md", "png"))}
    assert all(file.stat().st_size < 8000 for file in (folder / "rows").iterdir())
    assert set(results(folder)) == {ORIGINAL, "Ours"}
    assert len(list((folder / ".cache" / "runs").glob("*/unet"))) == 1  # --keep
    page = (folder / "leaderboard.md").read_text()
    assert "| Ours | " in page
    assert "- Lost: frog 0\n" in page
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 3 * 96
        assert grid.height > 2 * 96


def test_a_row_is_what_the_pocket_models_own_judge_says(finished: tuple[Path, int, str]):
    """`score.scores` counts on its own, from pictures drawn anew with the UNet that was kept."""
    folder, *_ = finished
    row = next(row for row in rows(TOY, ("Ours",), (), ()) if row.method == "Ours")
    questions = exam([("object", "frog")], 3, 7, 0)
    before, after = (
        answers(load(str(FOLDER), unet=unet), questions, "", None, "exam")
        for unet in (None, str(folder / ".cache" / "runs" / row.key[:16]))
    )
    there = scores([("object", "frog")], questions, before, after)
    for method, when in ((ORIGINAL, "before"), ("Ours", "after")):
        found = results(folder)[method]
        assert found["UA"]["value"] == pytest.approx(1 - there["concept"][when])
        assert found["IRA"]["value"] == pytest.approx(there["retain"]["object"][when])
        every = [3 * there["spared"][k][when] + 7 * there["retain"][k][when] for k in ("style", "background")]
        assert found["CRA"]["value"] == pytest.approx(sum(every) / 20)
        assert (found["UA"]["n"], found["IRA"]["n"], found["CRA"]["n"]) == (3, 7, 20)


def test_the_original_model_does_not_drift_and_costs_nothing(finished: tuple[Path, int, str]):
    found = results(finished[0])
    # 1 - x.x / (|x| |x|) in float64: each of D < 1000 terms rounds by at most eps = 2.2e-16, in any order of adding
    assert found[ORIGINAL]["drift"] < 1e-12
    assert found[ORIGINAL]["drift_rmse"] == 0
    assert found[ORIGINAL]["seconds"] == 0


def test_a_method_drifts_and_takes_time_and_memory(finished: tuple[Path, int, str]):
    ours = results(finished[0])["Ours"]
    for name in ("drift", "drift_rmse", "reinitialised", "seconds", "peak_memory_mib"):
        assert ours[name] > 0, name


def test_the_original_model_is_the_floor_of_distances(finished: tuple[Path, int, str]):
    line = next(csv.DictReader((finished[0] / "leaderboard.csv").open()))
    assert line["method"] == ORIGINAL
    assert float(line["fid_above"]) == 0
    assert float(line["fid"]) > 0
    assert line["n"] == "7"


@pytest.mark.slow
def test_finished_rows_stay_missing_and_stale_ones_are_run(
    finished: tuple[Path, int, str], capsys: pytest.CaptureFixture
):
    folder, *_ = finished
    before = ages(folder)
    assert run(folder, "--methods", "Ours") == 0
    assert ages(folder) == before
    assert "2 of 2 rows are finished" in capsys.readouterr().err
    first, ours = folder / "rows" / "original_frog_0.json", folder / "rows" / "ours_frog_0.json"
    was, pictures = ours.read_bytes(), first.read_bytes()
    ours.unlink()
    first.write_text(json.dumps(json.loads(first.read_text()) | {"key": "of another configuration"}))
    assert run(folder, "--no-run") == 0
    assert not ours.exists()
    assert "no row is finished" in capsys.readouterr().out
    assert run(folder, "--methods", "Ours") == 0
    said = capsys.readouterr().err
    assert "0 of 2 rows are finished" in said
    assert "1 rows are stale and run again: original_frog_0.json" in said
    assert first.read_bytes() == pictures
    assert ours.read_bytes() == was  # the kept run, the same pictures
    assert not list((folder / ".cache" / "runs").glob("*/unet"))  # without --keep a run goes once it is judged


def test_published_rows_make_the_same_tables_elsewhere(
    finished: tuple[Path, int, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder, *_ = finished
    results_dir = tmp_path / "results"
    assert run(folder, "--no-run", "--publish", "--results_dir", str(results_dir)) == 0
    published = {file.name for file in results_dir.iterdir()}
    assert published == {"toy.jsonl", "toy.csv", "toy.md", "toy.png", "toy-grid.png", "toy-distances.json"}
    capsys.readouterr()
    assert run(tmp_path / "new", "--methods", "Ours", "--results_dir", str(results_dir)) == 0
    assert "2 of 2 rows are finished" in capsys.readouterr().err
    for end in ("csv", "md"):
        assert (tmp_path / "new" / f"leaderboard.{end}").read_bytes() == (results_dir / f"toy.{end}").read_bytes()


def test_a_grid_without_samples_does_not_replace_the_published_one(finished: tuple[Path, int, str], tmp_path: Path):
    folder, *_ = finished
    results_dir = tmp_path / "results"
    assert run(folder, "--no-run", "--publish", "--results_dir", str(results_dir)) == 0
    grid = (results_dir / "toy-grid.png").read_bytes()
    assert run(tmp_path / "new", "--no-run", "--publish", "--results_dir", str(results_dir)) == 0
    assert (results_dir / "toy-grid.png").read_bytes() == grid


def test_the_tables_go_between_a_readmes_marks(finished: tuple[Path, int, str], tmp_path: Path):
    folder, *_ = finished
    readme = tmp_path / "README.md"
    marks = [f"<!-- {name}:{end} -->" for name in ("results", "leaderboard") for end in ("start", "end")]
    readme.write_text("before\n{}\nold{}\nbetween\n{}\nold{}\nafter\n".format(*marks))
    assert run(folder, "--no-run", "--readme", str(readme)) == 0
    head, ours, middle, table, tail = re.split("|".join(marks), readme.read_text())
    assert (head, middle, tail) == ("before\n", "\nbetween\n", "\nafter\n")
    assert "old" not in ours + table
    assert table.strip() in (folder / "leaderboard.md").read_text()
    assert "| Ours | " in table
    first = next(line for line in ours.splitlines() if line.startswith("| frog |"))
    rates = {method: 100 - 100 * x["UA"]["value"] for method, x in results(folder).items()}
    assert f"| {rates[ORIGINAL]:.1f} → {rates['Ours']:.1f} [" in first


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("<!-- leaderboard:end --> before <!-- leaderboard:start -->\n", "leaderboard"),
        ("<!-- leaderboard:start -->\n<!-- leaderboard:end -->\n", "results"),
    ],
)
def test_a_readme_without_marks_is_refused_before_the_first_row(tmp_path: Path, text: str, missing: str):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match=f"has no line <!-- {missing}:start -->"):
        run(tmp_path / "new", "--readme", str(readme))
    assert not (tmp_path / "new").exists()


def test_a_lost_method_is_named_with_its_log(finished: tuple[Path, int, str]):
    *_, said = finished
    assert "error: Lost on frog, seed 0, ended with exit code 2 (error: " in said
    assert "the model is lost" in said
    assert Path(said.strip().rsplit("see ", 1)[1]).is_file()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--suite", "digits"], "--suite digits is none of pocket,"),
        (["--processes", "0"], "--processes 0 is too small"),
        (["--seeds", "-1"], "--seeds -1 is below 0"),
        (["--methods", "magic"], "'magic' is not in this suite"),
        (["--publish", "--results_dir", "none"], "--publish needs a folder"),
        (["--publish", "--no-run"], "no row of toy is finished"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, words: list[str], text: str):
    with pytest.raises(UserError, match=text):
        run(tmp_path, *words)
