"""What saliencies select, on the pocket model with a handful of pictures."""

import csv
from pathlib import Path

import pytest
import torch

from erase_sd.common.errors import UserError
from erase_sd.methods import PRESETS
from erase_sd.models.parameters import select, without_norms
from erase_sd.models.pipeline import load
from erase_sd.pocket import FOLDER
from eval import selectivity
from eval.selectivity import overlap

FEW = {"forget_images": 3, "retain_images": 4, "sample_steps": 2, "batch_size": 2, "sensitivity_batches": 1}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """The lines and the page of two saliencies on two concepts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["scissorhands"], "pocket", PRESETS["scissorhands"]["pocket"] | FEW)
        return run(tmp_path_factory.mktemp("selectivity"), "abs", "magnitude")


def run(folder: Path, *saliencies: str) -> tuple[list[dict], str]:
    what = ["--concepts", "cat", "neon style", "--seeds", "0", "--scopes", "attn", "--batches", "1"]
    assert selectivity.main([*what, "--saliencies", *saliencies, "--output_dir", str(folder)]) == 0
    rows = list(csv.DictReader((folder / "selectivity.csv").read_text().splitlines()))
    return rows, (folder / "selectivity.md").read_text()


def test_every_saliency_is_measured_on_every_concept(ran: tuple[list[dict], str]):
    rows, page = ran
    assert [(row["saliency"], row["concept"]) for row in rows] == [
        (saliency, concept) for saliency in ("abs", "magnitude") for concept in ("cat", "neon style")
    ]
    assert page.count("\n| attn | ") == 2
    assert "± " in page
    for row in rows:
        assert 0 <= float(row["others"]) <= 1
        assert 0 <= float(row["retained"]) <= 1
        assert -1 <= float(row["cos_forget"]) <= 1
        assert -1 <= float(row["cos_contrast"]) <= 1


def test_what_looks_at_no_concept_selects_the_same_for_all(ran: tuple[list[dict], str]):
    assert [float(row["others"]) for row in ran[0] if row["saliency"] == "magnitude"] == [1, 1]
    assert all(0 < float(row["others"]) < 1 for row in ran[0] if row["saliency"] == "abs")


def test_a_trim_is_taken_back_before_the_next(ran: tuple[list[dict], str], tmp_path: Path, monkeypatch):
    monkeypatch.setitem(PRESETS["scissorhands"], "pocket", PRESETS["scissorhands"]["pocket"] | FEW)
    alone, _ = run(tmp_path, "magnitude")
    assert alone == [row for row in ran[0] if row["saliency"] == "magnitude"]


def test_as_many_entries_are_selected_as_the_default_trims(ran: tuple[list[dict], str]):
    attention = without_norms(network := load(str(FOLDER)).unet, select(network, "attn"))
    fraction = PRESETS["scissorhands"]["pocket"]["fraction"]
    assert {int(row["k"]) for row in ran[0]} == {round(fraction * sum(p.numel() for p in attention.values()))}


def test_the_overlap_is_the_share_of_the_first():
    first = {"a": torch.tensor([True, True, False]), "b": torch.tensor([[True, True]])}
    second = {"a": torch.tensor([True, False, True]), "b": torch.tensor([[False, False]])}
    assert overlap(first, second) == 1 / 4
    assert overlap(second, first) == 1 / 2
    with pytest.raises(UserError, match="nothing is selected"):
        overlap({"a": torch.tensor([False])}, {"a": torch.tensor([True])})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--concepts", "cat", "cat"], "--concepts cat cat leaves nothing to compare"),
        (["--concepts", "cat", "unicorn"], "unicorn"),
        (["--saliencies", "luck"], "luck"),
        (["--batches", "0"], "--batches 0 is too small"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_drawn(words: list[str], said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        selectivity.main([*words, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
