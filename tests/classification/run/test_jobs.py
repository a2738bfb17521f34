"""How a classifier's run ends is in its status.json, as for every other run."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from classification.data import partition
from classification.data.dataset import Dataset, Images
from classification.data.sources import load
from classification.metrics.mia import FEATURES
from classification.plan import make, training
from classification.run import jobs
from classification.settings import MIA_FEATURES, Data
from erase_sd.common.errors import UserError
from erase_sd.common.processes import accelerator
from erase_sd.methods.base import Method


@dataclass(frozen=True)
class Steps(Method):
    """A method of two steps that does something to the task after each of them."""

    act: object
    steps: int = 2

    def __call__(self, task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        for step in range(state["step"] if state else 0, self.steps):
            self.act(task)
            yield {"step": step, "loss": 0.0}, {"step": step + 1, "optimizer": {}}


def carry_out(task, folder: Path, act) -> dict:
    return jobs.carry_out(Steps(act), task, folder, {"method": "test"}, every=1, measure=jobs.no_scores)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def nothing(task) -> None:
    pass


def stop(task) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def explode(task) -> None:
    task.model.fc.weight.data.fill_(torch.inf)


def fail(task) -> None:
    raise KeyError("a defect")


def test_a_run_that_is_stopped_says_so_and_goes_on(tiny_task, tmp_path: Path):
    with pytest.raises(SystemExit):
        carry_out(tiny_task(), tmp_path, stop)
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("stopped", 143)
    record = carry_out(tiny_task(), tmp_path, nothing)
    assert status(tmp_path)["state"] == "complete"
    assert record["resumed"]
    assert record["trace"]["steps"] == 2


def test_a_run_that_loses_its_model_has_failed(tiny_task, tmp_path: Path):
    with pytest.raises(UserError, match=r"fc.weight holds NaN or infinity"):
        carry_out(tiny_task(), tmp_path, explode)
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("failed", 2)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_defect_of_ours_is_told_apart(tiny_task, tmp_path: Path):
    with pytest.raises(KeyError):
        carry_out(tiny_task(), tmp_path, fail)
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("failed", 1)


def test_a_complete_run_is_returned_as_it_is(tiny_task, tmp_path: Path):
    first = carry_out(tiny_task(), tmp_path, nothing)
    assert carry_out(tiny_task(), tmp_path, fail) == first


def part(images: Images, n: int, shift: int) -> Images:
    """The first images, their labels moved: the same pixels with other labels are other data."""
    few = images.take(torch.arange(n))
    return replace(few, labels=(few.labels + shift) % 10)


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Digits that a data folder changes: its name is the number by which labels are moved."""

    def small(name: str, folder: str | None) -> Dataset:
        whole, shift = load("digits"), int(folder or 0)
        return replace(whole, train=part(whole.train, 120, shift), test=part(whole.test, 40, shift))

    forget_loaded()
    monkeypatch.setattr(partition, "load", small)
    yield
    forget_loaded()


def forget_loaded() -> None:
    partition._loaded.cache_clear()
    partition._fingerprint.cache_clear()


@pytest.fixture
def run(folders, tmp_path: Path) -> Callable[..., dict]:
    """run(**values): the record of a run of the first digits, two steps where the method takes any."""

    def carry(**values) -> dict:
        common = {"dataset": "digits", "output_dir": str(tmp_path)}
        if "raw" not in values:
            common["raw"] = raw(tmp_path)
        plan = make(**common | values)
        return jobs.unlearn(plan, accelerator(None))

    return carry


def raw(root: Path, model: str = "smallnet", **data) -> str:
    """Train a network for one step, if it is not there yet, and return its folder."""
    recipe = training("digits", epochs=0.1, model=model)
    return str(jobs.train(Data(dataset="digits", **data), recipe, 0, root, accelerator(None)))


def test_two_data_folders_never_share_a_result(run, tmp_path: Path):
    one = run(method="ga", steps=2)
    assert run(method="ga", steps=2, data_dir="0")["folder"] == one["folder"]  # the same data, wherever they lie
    other = run(method="ga", steps=2, data_dir="3", raw=raw(tmp_path, data_dir="3"))
    assert other["folder"] != one["folder"]
    assert other["raw_folder"] != one["raw_folder"]
    again = [run(method="retrain", steps=1, data_dir=folder, raw=None)["folder"] for folder in ("0", "3")]
    assert again[0] != again[1]


def test_a_network_of_another_recipe_is_unlearned(run, tmp_path: Path):
    record = run(method="ga", steps=2, raw=raw(tmp_path, model="smallresnet"))
    assert "layer2.0.bn1.weight" in load_file(Path(record["folder"]) / "model.safetensors")
    retrained = run(method="retrain", steps=1, raw=raw(tmp_path, model="smallresnet"))
    assert retrained["config"]["model"] == "smallresnet"


def test_what_unlearned_already_unlearns_again(run, tmp_path: Path):
    first = run(method="ga", steps=1, raw=raw(tmp_path, model="smallresnet"))
    second = run(method="ft", steps=1, lr=0.1, raw=first["folder"])
    assert second["raw_folder"] == first["folder"]
    assert load_file(Path(second["folder"]) / "model.safetensors").keys() >= {"layer2.0.bn1.weight"}


def test_a_damaged_folder_is_a_user_error(run, tmp_path: Path):
    folder = Path(raw(tmp_path))
    (folder / "job.json").write_text("{")
    with pytest.raises(UserError, match="job.json cannot be read"):
        run(method="ga", steps=1, raw=str(folder))


def test_weights_to_start_from_are_not_asked_for_again(run, tmp_path: Path):
    folder = Path(raw(tmp_path))
    config = json.loads((folder / "job.json").read_text()) | {"weights": "/nowhere/resnet34.pth"}
    (folder / "job.json").write_text(json.dumps(config))
    assert run(method="ga", steps=1, raw=str(folder))["scores"]


def test_a_network_of_other_data_or_another_split_is_refused(run, tmp_path: Path):
    with pytest.raises(UserError, match=r"was trained on other data \(digits\)"):
        run(method="ga", steps=1, raw=raw(tmp_path, data_dir="3"))
    with pytest.raises(UserError, match="never saw some of what is to be forgotten: give its --split_seed 0"):
        run(method="ga", steps=1, split_seed=1)


def test_retrain_trains_no_other_network(run, tmp_path: Path):
    run(method="retrain", steps=1, raw=None, output_dir=str(tmp_path / "alone"))
    (only,) = (tmp_path / "alone" / "digits").iterdir()
    assert only.name.startswith("retrain-")


def test_nothing_done_is_the_original_model(run, tmp_path: Path):
    record = run(method="nothing")
    before = load_file(Path(raw(tmp_path)) / "model.safetensors")
    for name, x in load_file(Path(record["folder"]) / "model.safetensors").items():
        assert torch.equal(x, before[name])
    assert record["acted"] == {"steps": 1, "forget": 0, "projected": 0}


def test_every_feature_of_the_attack_is_scored_where_it_is_asked_for(run):
    found = run(method="nothing", mia_features=MIA_FEATURES)["scores"]
    for name in MIA_FEATURES[1:]:
        assert 0 <= found[f"mia_{name}"] <= 1
    assert set(FEATURES) == set(MIA_FEATURES)
    assert "mia_entropy" not in run(method="nothing")["scores"]


SCISSORHANDS = {"method": "scissorhands", "steps": 3, "lam": 0.1, "sensitivity_batches": 1}


@pytest.mark.parametrize(
    ("values", "acted"),
    [
        ({"method": "ft", "steps": 3}, 0),
        ({"method": "ga", "steps": 3}, 3),
        ({"method": "salun", "steps": 3, "walk": "turns"}, 1),  # 10 to forget, 98 to retain: 1 and 2 batches of 64
        ({"method": "scrub", "steps": 3, "max_epochs": 1}, 1),
        (SCISSORHANDS | {"release_at": None}, 3),
        (SCISSORHANDS | {"release_at": 0.0}, 0),
    ],
    ids=["ft", "ga", "salun", "scrub", "scissorhands", "released"],
)
def test_a_record_says_in_how_many_steps_the_forget_set_acted(run, values: dict, acted: int):
    found = run(**values)["acted"]
    assert (found["steps"], found["forget"]) == (3, acted)
    if "release_at" in values and acted == 0:
        assert found["projected"] == 0
