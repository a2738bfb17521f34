"""Killed anywhere, a run goes on to the very same weights. `make kill` kills it twenty times, the suite a few."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erase_sd.common.files import file_digest

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
QUICK = (
    "--preset paper --steps 5 --lr 1e-4 --batch_size 2 --sensitivity_batches 3 --checkpointing_steps 2 "
    "--forget_images 4 --retain_images 4 --sample_steps 2 --picture_steps 1 --optimizer adamw"
).split()
STAGES = ("sampling", "sensitivity", "repair", "saving", "results", "finish")
Job = Callable[..., int]


@pytest.fixture(scope="module")
def job(tiny_sd: Path) -> Iterator[Job]:
    """job(folder, stage=..., at=..., ...) -> exit code, negative for the signal that ended it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "killable.py")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(folder: Path, **moment) -> int:
            argv = ["--concept", "cat", "--model", str(tiny_sd), "--output_dir", str(folder), *QUICK]
            log = str(folder) + ".log"
            print(json.dumps({"argv": argv, "log": log, "moment": moment}), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert job(folder, stage="none") == 0, Path(f"{folder}.log").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def events(whole: Path) -> dict[str, int]:
    """How many moments each stage of it has."""
    *_, last = Path(f"{whole}.log").read_text().partition("EVENTS ")
    counts = json.loads(last)
    assert all(counts[stage] > 50 for stage in counts), counts
    return counts


def moment(rng: random.Random, events: dict[str, int], stage: str) -> dict:
    """Somewhere in the stage; every other time up to 20 ms after it, which may be inside one call."""
    return {
        "stage": stage,
        "at": rng.randint(1, int(0.98 * events[stage])),
        "delay": rng.choice([0, rng.uniform(0, 0.02)]),
    }


def same(folder: Path, whole: Path) -> None:
    log = Path(f"{folder}.log").read_text()[-3000:]
    assert file_digest(folder / WEIGHTS) == file_digest(whole / WEIGHTS), log
    assert (folder / "trace.csv").read_text() == (whole / "trace.csv").read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    assert {p.relative_to(folder) for p in folder.rglob("*")} == {p.relative_to(whole) for p in whole.rglob("*")}


def killed(code: int) -> bool:
    return code in (-signal.SIGKILL, -signal.SIGALRM)


def test_killed_in_every_stage_in_turn(job: Job, whole: Path, events: dict[str, int], tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    rng, moments = random.Random(seed), []
    for stage in ("sampling", "sensitivity", "repair", "results", "finish"):
        moments.append(moment(rng, events, stage) | {"delay": 0})
        assert job(tmp_path / "run", **moments[-1]) == -signal.SIGKILL, (seed, moments)
    print("seed", seed, moments)
    assert job(tmp_path / "run") == 0
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_killed_anywhere_twenty_times(
    job: Job, whole: Path, events: dict[str, int], tmp_path: Path, trial: int, capsys: pytest.CaptureFixture
) -> None:
    seed = random.randrange(10**6)
    at = moment(random.Random(seed), events, STAGES[trial % len(STAGES)])
    code = job(tmp_path / "run", **at)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*"))
    with capsys.disabled():
        print(
            f"\nkill {trial + 1}: seed {seed}, {at}, exit code {code}, checkpoints {' '.join(left) or 'none'}", end=" "
        )
    assert killed(code) or (at["delay"] and code == 0)  # it may have been faster than the clock
    assert job(tmp_path / "run") == 0
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["previews", "sampling", "results"])
def test_a_signal_at_any_moment_stops_and_the_same_command_goes_on(
    job: Job, whole: Path, events: dict[str, int], tmp_path: Path, stage: str
) -> None:
    at = random.Random(stage).randint(1, events[stage] // 3)
    assert job(tmp_path / "run", stage=stage, at=at, signum=int(signal.SIGTERM)) == 143
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 143)
    assert (tmp_path / "run/checkpoints/checkpoint-000005").is_dir() == (stage == "results")
    assert job(tmp_path / "run") == 0
    same(tmp_path / "run", whole)
