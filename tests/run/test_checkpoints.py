"""Checkpoints: whole or passed over, whatever happens to the process or the files."""

import logging

import pytest
import torch

from erase_sd.common.errors import UserError
from erase_sd.run.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"w": torch.arange(6.0).view(2, 3), "adam/step": torch.tensor(3.0), "half": torch.ones(2).bfloat16()}


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_a_checkpoint_comes_back_as_it_went(tmp_path):
    tensors = TENSORS | {"t": TENSORS["w"].clone().T}
    folder = save_checkpoint(tmp_path, 100, tensors, {"seed": 3}, None)
    assert folder == tmp_path / "checkpoint-000100" == latest_checkpoint(tmp_path)
    loaded, meta = load_checkpoint(folder)
    assert meta == {"seed": 3}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) and loaded[n].dtype == tensors[n].dtype for n in tensors)


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, TENSORS, {}, None))
    (tmp_path / "checkpoint-000001" / "state.safetensors").unlink()  # a run may have removed it meanwhile
    assert not torch.equal(loaded["w"].mul_(2), loaded["w"])
    assert torch.equal(loaded["w"], TENSORS["w"])
    adam = load_checkpoint(save_checkpoint(tmp_path, 2, TENSORS, {}, None))[0].below("adam/")
    assert dict(adam) == {"step": TENSORS["adam/step"]}
    assert len(adam) == 1
    assert "w" not in adam


def test_a_checkpoint_may_hold_no_tensors(tmp_path):
    assert load_checkpoint(save_checkpoint(tmp_path, 1, {}, {}, None)) == ({}, {})


def test_the_limit_removes_the_oldest_and_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {}, 2)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003"]

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("erase_sd.run.checkpoints.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 4, TENSORS, {}, 1)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_later_broken_checkpoint_never_costs_the_new_one(tmp_path):
    for step in (5, 9):
        save_checkpoint(tmp_path, step, TENSORS, {}, None)
    (tmp_path / "checkpoint-000009" / "state.safetensors").write_bytes(b"")
    assert save_checkpoint(tmp_path, 7, TENSORS, {}, 1) == latest_checkpoint(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, TENSORS, {}, None)
    assert latest_checkpoint(tmp_path).name == "checkpoint-1000000"


def truncate(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder):
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(data)


DAMAGES = [
    (truncate, "bytes long"),
    (flip, "have changed"),
    (lambda folder: (folder / "state.safetensors").unlink(), "does not exist"),
    (lambda folder: (folder / "state.json").unlink(), "does not exist"),
    (lambda folder: (folder / "state.json").write_text('{"st'), "not a checkpoint's manifest"),
    (lambda folder: (folder / "state.json").write_text("[]"), "not a checkpoint's manifest"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, damage, reason):
    good, bad = (save_checkpoint(tmp_path, step, TENSORS, {}, None) for step in (1, 2))
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == good
    assert "checkpoint-000002" in caplog.text
    assert reason in caplog.text
    with pytest.raises(UserError, match=f"{reason}.*checkpoint-000001"):
        load_checkpoint(bad)


def test_without_checkpoints_there_is_no_latest_one(tmp_path):
    (tmp_path / "checkpoint-final").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(UserError, match="checkpoint-000007.*other checkpoints there: none"):
        load_checkpoint(tmp_path / "checkpoint-000007")
