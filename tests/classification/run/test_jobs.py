"""How a classifier's run ends is in its status.json, as for every other run."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from classification.run import jobs
from erase_sd.common.errors import UserError
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
