"""The command `python -m erase_sd.export`: what it refuses before anything is written."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erase_sd.common.errors import UserError
from erase_sd.export import main
from erase_sd.exports import FORMATS
from tests.exports.conftest import Run, write_run

SUFFIX = {"single-file": ".safetensors", "delta": ".safetensors", "pt": ".pt"}


def command(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "erase_sd.export", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_a_mistake_is_one_sentence_and_exit_code_2(sd1: Run, tmp_path: Path) -> None:
    run = command(sd1.folder, "--to", "delta", "--output", tmp_path / "cat.zip")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: --output ")
    assert run.stderr.count("\n") == 1


def test_help_needs_neither_diffusers_nor_transformers() -> None:
    code = "import sys, erase_sd.export; print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "0 runs are given"),
        (["{run}"], "the format is missing"),
        (["{run}", "--to", "delta"], "--output is missing"),
        (["{run}", "--to", "delta", "--output", "{out}.pt"], "give it the suffix .safetensors"),
        (["{run}", "--to", "pipeline", "--output", "{out}.safetensors"], "pipeline is a folder"),
        (["{run}", "--to", "delta", "--output", "{out}.safetensors", "--dtype", "fp16"], "holds fp32, not fp16"),
        (["{run}", "--to", "lora", "--output", "{out}", "--dtype", "fp32", "fp16"], "holds one type"),
        (["{run}", "--to", "lora", "--output", "{out}", "--rank", "0"], "--rank 0 is no rank"),
        (["{run}", "--to", "lora", "--output", "{out}", "--min_energy", "1.5"], "--min_energy 1.5 is no share"),
        (["{out}", "--to", "lora", "--output", "{out}"], "is no folder"),
        (["--apply", "a", "--restore", "b", "--model", "c"], "are opposites"),
        (["--apply", "a"], "--model is missing"),
        (["--apply", "a", "--model", "b", "--to", "pt"], "leave the run and --to away"),
    ],
)
def test_what_is_refused(sd1: Run, tmp_path: Path, words: list[str], said: str) -> None:
    filled = [word.format(run=sd1.folder, out=tmp_path / "out") for word in words]
    with pytest.raises(UserError, match=said):
        main(filled)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(sd1: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        main([str(sd1.folder), "--to", "pipeline", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is a file: name a place in a folder"):
        main([str(sd1.folder), "--to", "pipeline", "--output", str(tmp_path / "out" / "mine" / "deep")])
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_an_unfinished_run_is_refused(sd1: Run, tmp_path: Path) -> None:
    shutil.copytree(sd1.folder, tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text('{"state": "stopped", "code": 143, "message": ""}')
    with pytest.raises(UserError, match="is stopped, not complete"):
        main([str(tmp_path / "run"), "--to", "pipeline", "--output", str(tmp_path / "out")])


def test_another_base_than_the_runs_is_refused(sd1: Run, tmp_path: Path) -> None:
    pipe = copy.deepcopy(sd1.original())
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias[0] += 1
    pipe.save_pretrained(str(tmp_path / "other"))
    words = [
        str(sd1.folder),
        "--model",
        str(tmp_path / "other"),
        "--to",
        "pipeline",
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UserError, match="is not the base of this run"):
        main(words)
    assert not (tmp_path / "out").exists()
    assert main([*words, "--any_base"]) == 0


def test_a_base_of_another_shape_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    words = [str(runs["sd1"].folder), "--model", str(runs["sd2"].base), "--any_base", "--to", "pipeline"]
    with pytest.raises(UserError, match="differ in the shape of"):
        main([*words, "--output", str(tmp_path / "out")])


def test_a_network_of_somebody_else_is_exported_with_its_base_named(sd1: Run, tmp_path: Path) -> None:
    words = [str(sd1.folder / "unet"), "--to", "pipeline", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"has no run\.json"):
        main(words)
    assert main([*words, "--model", str(sd1.base)]) == 0


def test_a_network_with_nan_is_refused(sd1: Run, tmp_path: Path) -> None:
    shutil.copytree(sd1.folder, tmp_path / "run")
    unet = copy.deepcopy(sd1.erased().unet)
    unet.conv_in.bias.data[0] = float("nan")
    unet.save_pretrained(str(tmp_path / "run" / "unet"))
    with pytest.raises(UserError, match=r"conv_in\.bias has NaN"):
        main([str(tmp_path / "run"), "--to", "pipeline", "--output", str(tmp_path / "out")])


def test_a_run_that_changed_nothing_has_no_delta(sd1: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sd1.base, sd1.original().unet)
    with pytest.raises(UserError, match="is the base's to the bit"):
        main([str(run.folder), "--to", "delta", "--output", str(tmp_path / "a.safetensors")])


@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if form.local])
def test_nothing_is_pickled_but_what_was_asked_for(sd1: Run, tmp_path: Path, form: str) -> None:
    """A pickle begins with its protocol's opcode, an archive of torch.save with the mark of a zip file."""
    out = tmp_path / f"out{SUFFIX.get(form, '')}"
    assert main([str(sd1.folder), "--to", form, "--output", str(out), "--partial"]) == 0
    for path in [out, *out.rglob("*")]:
        if path.suffix == ".safetensors":
            load_file(path)  # begins with the length of its header, which can be any byte
        elif path.is_file() and path.suffix != ".pt":
            start = path.read_bytes()[:4]
            assert start[:1] != b"\x80"
            assert start != b"PK\x03\x04"


@pytest.mark.parametrize("form", ["pipeline", "delta"])
def test_a_write_that_fails_leaves_nothing(
    sd1: Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / f"out{SUFFIX.get(form, '')}"
    with pytest.raises(OSError, match="No space left"):
        main([str(sd1.folder), "--to", form, "--output", str(out), "--partial"])
    assert not list(tmp_path.iterdir())


def test_the_record_is_not_taken_on_trust(sd1: Run, tmp_path: Path) -> None:
    shutil.copytree(sd1.folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({})[:-1])
    with pytest.raises(UserError, match="holds a damaged record"):
        main([str(tmp_path / "run"), "--to", "pipeline", "--output", str(tmp_path / "out")])
