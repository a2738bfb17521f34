"""Trackers of accelerate: told the configuration and every step, closed at the end, and never dropped in silence."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline

from erase_sd import erase
from erase_sd.common import processes
from erase_sd.common.errors import UserError

QUICK = {
    "steps": 2,
    "batch_size": 2,
    "sensitivity_batches": 1,
    "forget_images": 2,
    "retain_images": 2,
    "sample_steps": 2,
    "picture_steps": 2,
}


class Diary(GeneralTracker):
    name, requires_logging_directory = "diary", False

    def __init__(self) -> None:
        super().__init__()
        self.config, self.rows, self.closed = {}, [], 0

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None = None, **more) -> None:
        self.rows.append(values | {"at": step})

    def finish(self) -> None:
        self.closed += 1


def test_a_tracker_is_told_everything_and_closed(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    diary = Diary()
    accelerator = Accelerator(cpu=True, log_with=diary)
    erase(tiny_pipe, ("cat", "dog"), output_dir=tmp_path / "run", accelerator=accelerator, **QUICK)
    assert diary.config["concept"] == "cat dog"
    assert diary.config["steps"] == 2
    assert diary.config["rank_scope"] == "None"
    assert [row["at"] for row in diary.rows] == [0, 1]
    assert diary.closed == 1
    assert all({"loss_r", "loss_o", "c", "lr", "images/s"} <= row.keys() for row in diary.rows)
    assert all(value == value for row in diary.rows for value in row.values())  # NaN is no value
    assert "images/s" not in (tmp_path / "run/trace.csv").read_text()


def test_one_that_is_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "get_available_trackers", list)
    with pytest.raises(UserError, match="--report_to tensorboard is not installed: install the trackers extra"):
        processes.accelerator(None, "tensorboard", "runs/x")


def test_files_need_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="writes files: give an output_dir"):
        processes.accelerator(None, "tensorboard", None)


def test_report_to_and_ones_own_accelerator_are_two_answers_to_one_question(
    tiny_pipe: StableDiffusionPipeline,
) -> None:
    with pytest.raises(UserError, match="give log_with to yours"):
        erase(tiny_pipe, "cat", accelerator=Accelerator(cpu=True), report_to="wandb", **QUICK)


def test_tensorboard_files_are_in_the_folder(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="of the trackers extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    erase(tiny_pipe, "cat", output_dir=tmp_path / "run", report_to="tensorboard", **QUICK)
    events = EventAccumulator(str(tmp_path / "run/logs/erase-sd")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss_r")] == [0, 1]
    assert list((tmp_path / "run/logs").rglob("hparams.yml"))
