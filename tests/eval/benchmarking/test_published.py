"""Published results: the committed tables are rebuilt from the committed rows, byte for byte."""

import json
from pathlib import Path

import pytest

from erase_sd.common.errors import UserError
from eval import benchmark
from eval.benchmarking.rows import BenchmarkRow, file_name, read_published, stored, write_published

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"


def rebuild(suite: str, folder: Path, *more: str) -> None:
    words = ["--suite", suite, "--no-run", "--output_dir", str(folder), "--results_dir", str(RESULTS)]
    assert benchmark.main([*words, *more]) == 0


def test_the_leaderboard_and_the_readme_are_rebuilt_from_the_rows(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    rebuild("pocket", tmp_path / "new", "--readme", str(readme))
    assert (tmp_path / "new" / "leaderboard.csv").read_bytes() == (RESULTS / "pocket.csv").read_bytes()
    assert (tmp_path / "new" / "leaderboard.md").read_bytes() == (RESULTS / "pocket.md").read_bytes()
    assert (tmp_path / "new" / "distances.json").read_bytes() == (RESULTS / "pocket-distances.json").read_bytes()
    assert readme.read_bytes() == (ROOT / "README.md").read_bytes()


def test_the_ablation_is_rebuilt_from_the_rows(tmp_path: Path):
    rebuild("pocket-ablation", tmp_path)
    assert (tmp_path / "leaderboard.csv").read_bytes() == (RESULTS / "pocket-ablation.csv").read_bytes()
    assert (tmp_path / "leaderboard.md").read_bytes() == (RESULTS / "pocket-ablation.md").read_bytes()


def test_every_published_file_has_its_line_in_the_page():
    page = (RESULTS / "README.md").read_text()
    for file in RESULTS.iterdir():
        if file.name != "README.md":
            assert f"`{file.name}`" in page


def make_row(method: str, key: str) -> BenchmarkRow:
    return BenchmarkRow(method, "frog", 0, (4, 40), (), {}, key)


def make_result(method: str, key: str) -> dict:
    return {"method": method, "concept": "frog", "seed": 0, "key": key, "seconds": 0.1}


def test_published_rows_are_read_back(tmp_path: Path):
    ours, theirs = make_result("Ours", "a"), make_result("SLD (max)", "b")
    finished = [(make_row("Ours", "a"), ours), (make_row("SLD (max)", "b"), theirs)]
    write_published(tmp_path, "toy", finished)
    assert (tmp_path / "toy.jsonl").read_text().count("\n") == 2
    published = read_published(str(tmp_path), "toy").rows
    assert published == {file_name("Ours", "frog", 0): ours, file_name("SLD (max)", "frog", 0): theirs}


def test_a_row_in_the_working_folder_comes_before_the_published_one(tmp_path: Path):
    row = make_row("Ours", "a")
    published = {row.file: make_result("Ours", "a")}
    assert stored(row, tmp_path, published) == published[row.file]
    newer = make_result("Ours", "a") | {"seconds": 0.2}
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / row.file).write_text(json.dumps(newer))
    assert stored(row, tmp_path, published) == newer


def test_a_published_row_of_another_configuration_is_none(tmp_path: Path):
    row = make_row("Ours", "a")
    assert stored(row, tmp_path, {row.file: make_result("Ours", "of another configuration")}) is None


def test_nothing_is_published_where_there_is_no_file(tmp_path: Path):
    assert read_published(str(tmp_path), "toy") == ({}, {})
    assert read_published(None, "pocket") == ({}, {})


def test_a_damaged_line_is_named(tmp_path: Path):
    (tmp_path / "toy.jsonl").write_text(json.dumps(make_result("Ours", "a")) + "\n{\n")
    with pytest.raises(UserError, match="line 2 of .*toy.jsonl is damaged"):
        read_published(str(tmp_path), "toy")
