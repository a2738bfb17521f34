"""A disk that is full or read-only, and files that were damaged: mended, the same command ends in the same bytes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from erase_sd import train
from erase_sd.common.files import file_digest
from erase_sd.run import loop
from tests.end_to_end.test_train_cli import QUICK

pytestmark = pytest.mark.slow
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def ended(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Return a function that runs the installed command into a folder: (exit code, last line of stderr)."""

    def run(folder: Path, *more: str) -> tuple[int, str]:
        words = ["--concept", "cat", "--model", str(tiny_sd), *QUICK, "--steps", "3", "--picture_steps", "1", *more]
        monkeypatch.setattr(sys, "argv", ["erase-sd", *words, "--output_dir", str(folder)])
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as stop:
            train.program()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return stop.value.code or 0, error.strip().rpartition("\n")[2]

    return run


@pytest.fixture
def whole(ended: Callable, tmp_path: Path) -> str:
    """The digest of the weights of a run that nothing disturbed."""
    assert ended(tmp_path / "whole")[0] == 0
    return file_digest(tmp_path / "whole" / WEIGHTS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_a_full_disk_is_one_sentence_and_loses_nothing(ended: Callable, whole: str, disk: Path) -> None:
    code, said = ended(disk / "run")
    assert code == 2
    assert "No space left on device" in said
    assert str(disk) in said
    remount(disk, "size=200m")
    assert ended(disk / "run")[0] == 0
    assert file_digest(disk / "run" / WEIGHTS) == whole


def test_a_read_only_disk_is_one_sentence(ended: Callable, whole: str, disk: Path) -> None:
    remount(disk, "size=200m,ro")
    code, said = ended(disk / "run")
    assert code == 2
    assert "Read-only file system" in said
    remount(disk, "rw")
    assert ended(disk / "run")[0] == 0
    assert file_digest(disk / "run" / WEIGHTS) == whole


def test_a_stopped_run_with_damaged_files_goes_on(
    ended: Callable, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = loop.show

    def stopped(bar: object, record: dict) -> None:
        show(bar, record)
        if record.get("step") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "show", stopped)
    folder, all_kept = tmp_path / "run", ("--checkpoints_total_limit", "none")
    assert ended(folder, *all_kept)[0] == 130
    monkeypatch.setattr(loop, "show", show)
    newest = sorted((folder / "checkpoints").glob("checkpoint-*"))[-1]
    (newest / "state.safetensors").write_bytes(b"zeros")
    (folder / "status.json").write_text("{")
    code, said = ended(folder, *all_kept)
    assert code == 2
    assert "status.json is damaged: remove it" in said
    (folder / "status.json").unlink()
    assert ended(folder, *all_kept)[0] == 0
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    assert file_digest(folder / WEIGHTS) == whole
