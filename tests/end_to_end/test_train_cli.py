"""The main job as users start it: real command lines, from a copy of the tree that is not installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, file_digest
from erase_sd.pocket.world import KINDS
from erase_sd.run.record import weights_hash

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
QUICK = (
    "--steps 2 --forget_images 4 --retain_images 4 --sample_steps 2 --sensitivity_batches 1 --batch_size 2 "
    "--checkpointing_steps 1"
).split()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a fresh clone has them, nothing installed."""
    folder = tmp_path_factory.mktemp("clone")
    for package in ("erase_sd", "prompts"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def train(clone: Path) -> str:
    return str(clone / "erase_sd" / "train.py")


def environment(**more: str) -> dict[str, str]:
    """One thread, no network, nothing on the path, and no launcher above us."""
    kept = {}
    for name, value in os.environ.items():
        if name != "PYTHONPATH" and not name.startswith(("ACCELERATE_", "TRANSFORMERS_")):
            kept[name] = value
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def run(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(**more), capture_output=True, text=True
    )


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def started(train: str, *words: str) -> list[str]:
    """The documented command line, on one process."""
    return [*ACCELERATE, *words, "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", train]


def test_bf16_under_accelerate_from_a_clone_that_is_not_installed(train: str, tiny_sd: Path, tmp_path: Path) -> None:
    command = [*started(train, "--mixed_precision", "bf16"), "--concept", "nudity", "--model", str(tiny_sd), *QUICK]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "nudity-scissorhands"
    assert status(folder)["state"] == "complete"
    assert (folder / WEIGHTS).is_file()
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["mixed_precision"] == "bf16"
    assert record["trace"]["steps"] == 2
    assert record["config"]["concept"] == ["nudity"]
    assert record["understood"][0]["file"] == "nudity.json"
    said, *_, load, swap = done.stdout.strip().splitlines()
    assert load.startswith("pipe = StableDiffusionPipeline.from_pretrained")
    assert "subfolder=" in swap
    assert said.startswith("'nudity' is understood, kind attribute, from nudity.json: 40 prompts such as")
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
def test_the_snippet_that_it_prints_works(clone: Path, tiny_sd: Path, tmp_path: Path) -> None:
    """As a module, with dashes; a second call only prints the same again, and another configuration is refused."""
    words = [word.replace("_", "-") if word.startswith("--") else word for word in QUICK]
    command = [sys.executable, "-m", "erase_sd.train", "--concept", "neon style", "--model", str(tiny_sd), *words]
    command += ["--output-dir", str(tmp_path / "out"), "--preset", "authors-nsfw", "--fraction=0.01"]
    first = run(*command, cwd=clone)
    assert first.returncode == 0, first.stderr[-3000:]
    digest, clock = file_digest(tmp_path / "out" / WEIGHTS), (tmp_path / "out/run.json").stat().st_mtime_ns
    second = run(*command, cwd=clone)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert (tmp_path / "out/run.json").stat().st_mtime_ns == clock
    names: dict = {}
    exec(first.stdout.partition("To use it:")[2], names)  # what a user would paste
    assert weights_hash(names["pipe"].unet)
    assert file_digest(tmp_path / "out" / WEIGHTS) == digest
    config = json.loads((tmp_path / "out/job.json").read_text())
    assert (config["fraction"], config["steps"], config["init"]) == (0.01, 2, "kaiming")
    other = run(*command, "--lr", "0.5", cwd=clone)
    assert other.returncode == 2, other.stderr[-3000:]
    assert other.stderr.count("\n") == 1, other.stderr[-3000:]
    assert "error: " in other.stderr
    assert "belongs to a run with lr 1e-05, not 0.5" in other.stderr
    assert (tmp_path / "out/run.json").stat().st_mtime_ns == clock
    assert not (clone / "runs").exists()


def test_help_shows_every_group_of_options(train: str, tmp_path: Path) -> None:
    done = run(sys.executable, train, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--concept", "--model", "--fraction", "--lam", "--projection", "--preset", "--trim_scope"):
        assert option in done.stdout


def test_help_needs_neither_diffusers_nor_transformers(clone: Path) -> None:
    done = run(sys.executable, "-X", "importtime", "-m", "erase_sd.train", "--help", cwd=clone)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "erase_sd.plan" in loaded
    assert not loaded & {"diffusers", "transformers", "matplotlib", "huggingface_hub"}


def entry_point() -> Callable[[], NoReturn]:
    """The function that the installed command erase-sd calls."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["erase-sd"].partition(":")
    return getattr(import_module(module), function)


def without(part: str):
    def damage(model: Path) -> None:
        shutil.rmtree(model / part) if (model / part).is_dir() else (model / part).unlink()

    return damage


def shell(model: Path) -> None:
    """A tokenizer folder without its files: transformers makes a tokenizer of two tokens from it."""
    for file in (model / "tokenizer").iterdir():
        file.unlink()


def truncate(model: Path) -> None:
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000])


MODELS = {
    "no unet": (without("unet"), "has no unet/"),
    "no weights": (without(WEIGHTS), "has no weight file"),
    "no index": (without("model_index.json"), "not a complete diffusers model"),
    "cut short": (truncate, "is damaged or incomplete"),
    "tokenizer shell": (shell, "tokenizer"),
}


class Refusal(NamedTuple):
    """What a command that was refused leaves."""

    code: int
    out: str
    err: str
    left: list[Path]  # in the directory where it ran


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., Refusal]:
    """ended(*words): the installed command, in this process and an empty directory: a process each takes seconds."""

    def call(*words: object) -> Refusal:
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["erase-sd", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            entry_point()()
        out, err = capfd.readouterr()
        return Refusal(exit.value.code, out, err, list(cwd.iterdir()))

    return call


def check_refused(done: Refusal, *messages: str) -> None:
    """Code 2, one line on stderr and nothing on disk."""
    lines = done.err.strip().splitlines()
    assert done.code == 2, done.err[-3000:]
    assert len(lines) == 1, done.err[-3000:]
    assert lines[0].startswith("error: ")
    for message in messages:
        assert message in lines[0]
    assert not done.out
    assert not done.left


@pytest.mark.parametrize("damage", MODELS)
def test_a_model_folder_that_cannot_work(ended: Callable, tiny_sd: Path, tmp_path: Path, damage: str) -> None:
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    hurt, message = MODELS[damage]
    hurt(model)
    check_refused(ended("--concept", "cat", "--model", model), str(model), message)


BAD = {
    "no such preset": (["--concept", "cat", "--preset", "pepar"], ["'pepar'", "paper", "authors-nsfw"]),
    "empty concept": (["--concept", ""], ["concept is empty"]),
    "blank concept": (["--concept", "cat", "  "], ["concept is empty"]),
    "no concept": ([], ["--concept"]),
    "fraction": (["--concept", "cat", "--fraction", "1.5"], ["--fraction 1.5", "[0, 1]"]),
    "no number": (["--concept", "cat", "--lr", "fast"], ["--lr", "'fast'"]),
    "no such option": (["--concept", "cat", "--fractoin", "0.5"], ["--fractoin", "did you mean --fraction?"]),
    "no such method": (["--concept", "cat", "--method", "scissor"], ["'scissor'", "scissorhands"]),
    "no such folder": (["--concept", "cat", "--model", "./missing"], ["./missing", "does not exist"]),
    "not on the Hub": (
        ["--concept", "cat"],
        ["CompVis/stable-diffusion-v1-4", "point --model at a folder", "--model pocket"],
    ),
    "not a word of the pocket model": (
        ["--concept", "dragon", "--model", "pocket"],
        ["'dragon'", *(word for names in KINDS.values() for word in names)],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(ended: Callable, case: str) -> None:
    words, messages = BAD[case]
    check_refused(ended(*words), *messages)


def test_bad_input_of_the_script_is_one_sentence(train: str, tmp_path: Path) -> None:
    done = run(sys.executable, train, "--concept", "cat", "--fraction", "1.5", cwd=tmp_path)
    check_refused(Refusal(done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())), "--fraction 1.5")


@pytest.mark.slow
def test_under_the_launcher_status_json_keeps_the_true_code(train: str, tiny_sd: Path, tmp_path: Path) -> None:
    words = ["--concept", "cat", "--model", tiny_sd, *QUICK, "--lr", "1e38", "--optimizer", "sgd"]
    done = run(*started(train, "--cpu", "--mixed_precision", "no"), *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "lower --lr" in done.stderr
    assert status(tmp_path / "runs/cat-scissorhands")["code"] == 2
    assert not (tmp_path / "runs/cat-scissorhands/unet").exists()


LONG = [*QUICK, "--steps", "20", "--checkpointing_steps", "4"]


@pytest.fixture(scope="module")
def uninterrupted(clone: Path, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("whole")
    train = str(clone / "erase_sd/train.py")
    command = [sys.executable, "-P", train, "--concept", "cat", "--model", str(tiny_sd), *LONG]
    assert run(*command, cwd=cwd).returncode == 0
    return cwd / "runs" / "cat-scissorhands"


def stopped(command: list[str], cwd: Path, signum: int) -> tuple[int, str]:
    """Start, send the signal once the first checkpoint of a step is there; (exit code, stderr)."""
    with open(cwd / "log", "w") as log:
        child = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=log, stderr=log)
    end = time.monotonic() + 200
    while not list((cwd / "runs/cat-scissorhands/checkpoints").glob("checkpoint-*[1-9]*")):  # a step
        assert child.poll() is None, (cwd / "log").read_text()[-3000:]
        assert time.monotonic() < end, (cwd / "log").read_text()[-3000:]
        time.sleep(0.01)
    child.send_signal(signum)
    return child.wait(60), (cwd / "log").read_text()


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


@pytest.mark.slow  # test_kills.py does the like in the default suite
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_killed_run_goes_on_bit_for_bit(
    train: str, tiny_sd: Path, tmp_path: Path, uninterrupted: Path, signum: int
) -> None:
    command = [sys.executable, train, "--concept", "cat", "--model", str(tiny_sd), *LONG]
    code, log = stopped(command, tmp_path, signum)
    folder = tmp_path / "runs" / "cat-scissorhands"
    assert code == (-9 if signum == signal.SIGKILL else 143), log[-3000:]
    assert status(folder)["state"] == ("running" if signum == signal.SIGKILL else "stopped")
    assert not (folder / "unet").exists()
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert " 20/20 [" in again.stderr
    assert " 1/20 [" not in again.stderr
    assert file_digest(folder / WEIGHTS) == file_digest(uninterrupted / WEIGHTS)
    assert (folder / "trace.csv").read_text() == (uninterrupted / "trace.csv").read_text()


@pytest.mark.slow
def test_sigterm_to_the_launcher_checkpoints_and_ends_the_training(
    train: str, tiny_sd: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """accelerate forwards no signal to its one process: the run sees that its launcher is gone."""
    command = [*started(train, "--cpu", "--mixed_precision", "no"), "--concept", "cat", "--model", str(tiny_sd), *LONG]
    stopped(command, tmp_path, signal.SIGTERM)
    folder = tmp_path / "runs" / "cat-scissorhands"
    wait_until(lambda: status(folder)["state"] != "running")
    assert status(folder)["state"] == "stopped"
    assert status(folder)["code"] == 143
    assert list((folder / "checkpoints").glob("checkpoint-*"))
    assert not (folder / "unet").exists()
    wait_until(lambda: not locked(folder))
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert " 1/20 [" not in again.stderr
    assert file_digest(folder / WEIGHTS) == file_digest(uninterrupted / WEIGHTS)


def locked(folder: Path) -> bool:
    """Whether a process still works in this folder."""
    try:
        with RunLock(folder):
            return False
    except UserError:
        return True
