"""The loop around every method: what it saves when, where it goes on, what it tells, how it stops."""

import io
import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.signals import StopFlag
from erase_sd.core.task import REPLICATED
from erase_sd.run import loop
from erase_sd.run.folder import Progress, RunFolder


class Counting:
    """Three sensitivity batches, a trim, six steps, each of which changes the weight; or killed after some of them."""

    steps = 6

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at

    def too_strong(self) -> tuple[str, ...]:
        return ()

    def __call__(self, task, state=None):
        for i, both in enumerate(self.records(task, state)):
            if i == self.kill_at:
                raise Killed
            yield both

    def records(self, task, state):
        if state is None or "measured" in state:
            n = state["measured"] if state else 0
            total = state["sums"]["g"].clone() if state else torch.zeros(1)
            for measured in range(n + 1, 4):
                total += measured
                yield {"phase": "sensitivity"}, {"step": 0, "measured": measured, "sums": {"g": total}}
            task.weight += total
            yield {"phase": "trim", "changed": {"w": 1}}, {"step": 0, "optimizer": {}}
            state = {"step": 0}
        for step in range(state["step"], self.steps):
            task.weight += 1
            yield {"step": step, "loss": float(step), "cos": math.nan, "c": 0.1}, {"step": step + 1, "optimizer": {}}


class Weight:
    shards = REPLICATED

    def __init__(self) -> None:
        self.weight = torch.zeros(1)

    def mean(self, x):
        return x


class Killed(BaseException):
    """What no code of ours handles."""


def go(root: Path, kill_at: int | None = None, every: int = 2, **how) -> tuple[float, list[str], list[dict]]:
    """Run in a folder, or until record number `kill_at`; (the weight, the checkpoints, what was logged)."""
    task, logged = Weight(), []
    method, weights = Counting(kill_at), {"w": task.weight}

    def log(values: dict, step: int) -> None:
        logged.append(values | {"at": step})

    try:
        with RunFolder(root, {"a": 1}, **how) as folder:
            loop.run(method, task, weights, folder, every=every, check=lambda step: None, description="", log=log)
    except Killed:
        pass
    return task.weight.item(), names(root), logged


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").glob("*"))


WHOLE = 1 + 2 + 3 + 6.0
LEFT = {  # records that came through -> the checkpoint that a killed run has left
    1: [],
    2: ["sensitivity-000002"],
    3: ["sensitivity-000002"],
    4: ["checkpoint-000000"],
    5: ["checkpoint-000000"],
    6: ["checkpoint-000002"],
    9: ["checkpoint-000004"],
}


@pytest.mark.parametrize("kill_at", LEFT)
def test_a_killed_run_loses_at_most_an_interval(tmp_path: Path, kill_at: int) -> None:
    assert go(tmp_path, kill_at)[1] == LEFT[kill_at]
    weight, left, logged = go(tmp_path)
    assert weight == WHOLE
    assert left == ["checkpoint-000006"]
    assert [values["at"] for values in logged] == list(range(max(0, (kill_at - 4) // 2 * 2), 6))


def test_the_limit_counts_sensitivity_too(tmp_path: Path) -> None:
    assert go(tmp_path, 5, every=1, limit=3)[1] == ["checkpoint-000000", "checkpoint-000001", "sensitivity-000003"]
    assert go(tmp_path, every=1, limit=None)[1] == [
        *(f"checkpoint-{i:06d}" for i in range(7)),
        "sensitivity-000003",
    ]


def test_a_named_checkpoint_is_gone_back_to_and_what_came_later_goes_with_the_first_new_one(tmp_path: Path) -> None:
    go(tmp_path, 9, every=2, limit=None)
    assert names(tmp_path)[:3] == ["checkpoint-000000", "checkpoint-000002", "checkpoint-000004"]
    for name in ("checkpoint-000002", str(tmp_path / "checkpoints" / "checkpoint-000002")):
        assert go(tmp_path, 1, every=2, limit=None, start=name)[1][:3] == names(tmp_path)[:3]  # killed before it saved
        weight, left, logged = go(tmp_path, start=name)
        assert weight == WHOLE
        assert left == ["checkpoint-000006"]
        assert logged[0]["at"] == 2
        go(tmp_path, 9, every=2, limit=None, start=None)


def test_to_start_over_keeps_what_is_there_until_the_first_new_checkpoint_is_whole(tmp_path: Path) -> None:
    go(tmp_path, 9)
    assert go(tmp_path, 1, start=None)[1] == ["checkpoint-000004"]
    assert go(tmp_path, 3, start=None)[1] == ["sensitivity-000002"]
    assert go(tmp_path)[0] == WHOLE


def test_a_checkpoint_that_does_not_exist_is_one_sentence_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint-000003 is no checkpoint of this run.*holds none; give"):
        go(tmp_path / "new", start="checkpoint-000003")
    assert not (tmp_path / "new").exists()
    go(tmp_path / "run", 9, limit=2)
    go(tmp_path / "other", 9)
    for name in ("checkpoint-000003", "", str(tmp_path / "other/checkpoints/checkpoint-000004")):
        with pytest.raises(UserError, match="holds checkpoint-000002, checkpoint-000004; give one of these, latest"):
            go(tmp_path / "run", start=name)


def test_leftovers_of_a_killed_run_go_and_other_hidden_files_stay(tmp_path: Path) -> None:
    for name in (".unet.ab12_xyz/new", ".unet.ab12_xyz.old", ".git.d"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".run.json.77.140123456789", ".gitignore", ".keep.me"):
        (tmp_path / name).write_text("")
    with RunFolder(tmp_path, {}):
        assert {path.name for path in tmp_path.iterdir()} == {".git.d", ".gitignore", ".keep.me", ".lock", "job.json"}


def test_trackers_get_the_numbers_and_the_speed_which_the_trace_leaves_out(tmp_path: Path) -> None:
    task = Weight()
    logged: list[dict] = []
    progress = loop.run(
        Counting(),
        task,
        {"w": task.weight},
        None,
        every=9,
        check=lambda step: None,
        description="",
        images=32,
        log=lambda values, step: logged.append(values | {"at": step}),
    )
    assert len(logged) == 6
    for values in logged:
        assert set(values) == {"step", "loss", "c", "images/s", "at"}
        assert values["images/s"] > 0
    assert progress.trace[3] == {"step": 3, "loss": 3.0, "cos": None, "c": 0.1}


@pytest.mark.parametrize("batches", [1, 2])
def test_a_signal_saves_after_the_record_at_hand(tmp_path: Path, batches: int) -> None:
    class Signalled(Counting):
        def records(self, task, state):
            for i, both in enumerate(super().records(task, state)):
                if i == batches - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield both

    task = Weight()
    with RunFolder(tmp_path, {"a": 1}) as folder, pytest.raises(SystemExit) as exit:
        loop.run(Signalled(), task, {"w": task.weight}, folder, every=100, check=lambda s: None, description="")
    assert exit.value.code == 143
    assert names(tmp_path) == [f"sensitivity-00000{batches}"]
    assert go(tmp_path)[0] == WHOLE


def test_another_ranks_signal_stops_this_one_too(tmp_path: Path) -> None:
    task = Weight()
    task.mean = lambda x: x + (0.5 if task.weight > 7 else 0)  # of two ranks the other was told to
    with RunFolder(tmp_path, {"a": 1}) as folder, pytest.raises(SystemExit) as exit:
        loop.run(Counting(), task, {"w": task.weight}, folder, every=100, check=lambda s: None, description="")
    assert exit.value.code == 143
    assert names(tmp_path) == ["checkpoint-000002"]


def test_a_signal_between_two_blocks_is_not_lost() -> None:
    with StopFlag() as outer:
        with StopFlag() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGINT)
        with StopFlag() as stop, pytest.raises(SystemExit) as exit:
            stop.leave()
        assert exit.value.code == 130
    with StopFlag() as later:
        later.leave()


class Run:
    """One run by `execute`, with notes on what it did in which order; `fails` is raised when its results are due."""

    def __init__(self, root: Path | None, method: Callable, fails: BaseException | None = None) -> None:
        self.method, self.fails, self.did = method, fails, []
        self.folder = RunFolder(root, {"a": 1}) if root else None

    @contextmanager
    def task(self):
        self.did.append("task")
        task = Weight()
        yield task, {"w": task.weight}
        self.did.append("left")

    def finish(self, progress: Progress) -> dict:
        self.did.append("finish")
        if self.fails:
            raise self.fails
        return {"steps": len(progress.trace)}

    def __call__(self, **options) -> dict:
        how = {"wait": lambda: self.did.append("wait"), "every": 2, "description": ""}
        return loop.execute(self.method, self.task(), self.folder, self.finish, **how | options)


def status(root: Path) -> dict:
    return json.loads((root / "status.json").read_text())


def test_a_run_leaves_its_task_before_its_results_and_no_checkpoint_after_them(tmp_path: Path) -> None:
    run = Run(tmp_path, Counting())
    assert run() == {"steps": 6}
    assert run.did == ["wait", "task", "left", "finish", "wait"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": 6}
    assert status(tmp_path) == {"state": "complete", "code": 0, "message": ""}
    assert names(tmp_path) == []


def test_without_a_folder_a_run_returns_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Run(None, Counting())() == {"steps": 6}
    assert list(tmp_path.iterdir()) == []


def test_a_complete_run_is_reused(tmp_path: Path) -> None:
    Run(tmp_path, Counting())()
    again, reused = Run(tmp_path, Counting()), []
    assert again(reuse=reused.append) == {"steps": 6}
    assert again.did == ["wait"]
    assert reused == [again.folder]


ENDS = {
    "mistake": (UserError("no such thing"), ("failed", 2, "no such thing")),
    "defect": (KeyError("oh"), ("failed", 1, "KeyError: 'oh'")),
    "stopped": (SystemExit(143), ("stopped", 143, "run the same command again to go on")),
    "interrupted": (KeyboardInterrupt(), ("stopped", 130, "run the same command again to go on")),
}


@pytest.mark.parametrize("name", ENDS)
def test_status_json_says_how_a_run_ended(tmp_path: Path, name: str) -> None:
    error, (state, code, message) = ENDS[name]
    with pytest.raises(type(error)):
        Run(tmp_path, Counting(), fails=error)()
    assert status(tmp_path) == {"state": state, "code": code, "message": message}
    assert names(tmp_path) == ["checkpoint-000006"]


def test_a_killed_run_says_that_it_is_running(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Run(tmp_path, Counting(kill_at=5))()
    assert status(tmp_path)["state"] == "running"


def test_what_fails_after_the_end_makes_no_complete_run_incomplete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, {"a": 1}) as folder:
        folder.status("running")
        folder.finish({"steps": 6})
        raise KeyboardInterrupt
    assert status(tmp_path)["state"] == "complete"


def test_a_folder_that_was_refused_keeps_its_status(tmp_path: Path) -> None:
    Run(tmp_path, Counting())()
    with pytest.raises(UserError), RunFolder(tmp_path, {"a": 2}):
        pass
    assert status(tmp_path)["state"] == "complete"


def test_a_signal_while_results_are_written_stops_before_the_run_is_complete(tmp_path: Path) -> None:
    class Told(Run):
        def finish(self, progress: Progress) -> dict:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().finish(progress)

    with pytest.raises(SystemExit) as exit:
        Told(tmp_path, Counting())()
    assert exit.value.code == 143
    assert status(tmp_path)["state"] == "stopped"
    assert names(tmp_path) == ["checkpoint-000006"]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_probe_that_is_not_finite_loses_the_model(tmp_path: Path, lost: float) -> None:
    def probe(task: Weight, step: int) -> None:
        if step == 4:
            raise FloatingPointError(f"the retain loss is {lost}")

    with pytest.raises(UserError, match=f"after 4 steps the retain loss is {lost}"):
        Run(tmp_path, Counting())(probe=probe)
    assert names(tmp_path) == ["checkpoint-000002"]


def test_weights_that_are_not_finite_lose_the_model() -> None:
    with pytest.raises(FloatingPointError, match="after 3 steps b holds NaN or infinity"):
        loop.check_finite(Weight(), {"a": torch.ones(2, dtype=torch.long), "b": torch.tensor([1, math.nan])}, 3)


def test_the_bar_shows_no_nan_and_whole_pictures_per_second() -> None:
    with tqdm(total=1, disable=False, file=io.StringIO()) as bar:
        loop.show(bar, {"step": 0, "loss": 0.25, "cos": math.nan, "images/s": 2431.7})
        assert "loss=0.25" in bar.postfix
        assert "images/s=2,432" in bar.postfix
        assert "nan" not in bar.postfix
        assert "e+" not in bar.postfix
