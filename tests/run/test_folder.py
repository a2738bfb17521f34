"""A run's folder: whose it is, and what a damaged or failed one says."""

from pathlib import Path

import pytest

from erase_sd.common.errors import UserError
from erase_sd.run.folder import RunFolder


def failed(path: Path) -> None:
    with pytest.raises(UserError, match="lost"), RunFolder(path, {"lr": 9.0}) as folder:
        folder.status("running")
        raise UserError("the model is lost")


def test_a_first_try_that_failed_does_not_keep_its_folder(tmp_path: Path) -> None:
    failed(tmp_path / "run")
    with RunFolder(tmp_path / "run", {"lr": 0.1}):
        pass


def test_what_a_tracker_wrote_does_not_keep_it_either(tmp_path: Path) -> None:
    failed(tmp_path / "run")
    (tmp_path / "run" / "logs" / "erase-sd").mkdir(parents=True)
    with RunFolder(tmp_path / "run", {"lr": 0.1}):
        pass


def test_a_failed_run_with_work_in_it_keeps_its_folder(tmp_path: Path) -> None:
    failed(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="belongs to a run with lr 9.0"), RunFolder(tmp_path / "run", {"lr": 0.1}):
        pass


@pytest.mark.parametrize("name", ["status.json", "run.json"])
@pytest.mark.parametrize("text", [b"{", b"7", b"\xff"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, text: bytes) -> None:
    folder = RunFolder(tmp_path, {})
    with folder:
        folder.status("complete")
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            folder.complete()
