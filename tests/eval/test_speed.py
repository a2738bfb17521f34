"""Every benchmark runs at toy size and prints its ratios; what they compare is equal. No test depends on time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erase_sd.core.sensitivity import top_k
from eval.speeds import projection, topk
from eval.speeds.fresh import SMALL, extra

ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def ran(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "eval.speed", *words]
    return subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=300)


def ratios(run: subprocess.CompletedProcess) -> list[tuple[str, float]]:
    assert run.returncode == 0, run.stderr
    found = [re.search(r"^(\w+): .* = ([-\d.e+]+) \(", line) for line in run.stdout.splitlines()]
    return [(line[1], float(line[2])) for line in found if line]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["topk", "--scores", "50000", "--tensors", "7"], ["topk"] * 4),
        (["projection", "--parameters", "50000", "--parts", "7"], ["projection"] * 2),
    ],
)
def test_a_benchmark_prints_its_ratios(words: list[str], lines: list[str]):
    run = ran(*words, "--rounds", "1")
    found = ratios(run)
    assert "load average" in run.stdout
    assert [name for name, _ in found] == lines


def test_the_detector_prints_rates_and_ratios():
    run = ran("detector", "--images", "2", "--rounds", "1")
    assert run.returncode == 0, run.stderr
    rows = [line.removeprefix("detector: ") for line in run.stdout.splitlines() if line.startswith("detector: ")][1:]
    rates = {row[:40].strip(): [float(word) for word in row[40:].split()] for row in rows}
    (a, *_), (b, *_) = rates["(a) nudenet, made anew for every image"], rates["(b) nudenet, one reused"]
    ours = rates["ours, 2 workers of 1 thread (default)"]
    assert len(rates) == 5 and ours[1:] == pytest.approx([ours[0] / a, ours[0] / b], abs=0.05)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "'nothing' is not one of"),
        (["topk", "--rounds", "0"], "--rounds 0"),
        (["topk", "--share", "2"], "--share 2.0"),
        (["projection", "--parameters", "many"], "'many' is not a whole number"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], sentence: str):
    run = ran(*words)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and sentence in run.stderr and len(run.stderr.splitlines()) == 1


def test_help_answers_without_loading_torch():
    code = "import sys; from eval.speed import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "" and "--scores" in run.stdout


def test_topk_notices_another_selection(monkeypatch: pytest.MonkeyPatch):
    scores, k = topk.made(1000, 3, 0.01)
    assert topk.compare(scores, k) == 0
    monkeypatch.setattr(topk, "top_k", lambda scores, k: top_k(scores, k + 1))
    with pytest.raises(RuntimeError, match="different entries"):
        topk.compare(scores, k)


def test_topk_counts_ties_that_kthvalue_lets_in():
    assert topk.compare({"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([2.0, 2.0])}, 2) == 2


def test_projection_notices_another_result(monkeypatch: pytest.MonkeyPatch):
    g, g_f = projection.made(1000, 3)
    assert projection.compare(g, g_f) < 1e-6
    monkeypatch.setattr(projection, "closed", lambda g, g_f: None)
    projection.draw_(g, g_f)
    with pytest.raises(RuntimeError, match="differ"):
        projection.compare(g, g_f)


def zeros(n: int) -> tuple[torch.Tensor]:
    return (torch.zeros(n).fill_(1),)


def three_times(x: torch.Tensor) -> dict[str, torch.Tensor]:
    a, b = x + 1, x + 2
    return {"c": a + b}


def test_extra_memory_is_what_was_held_beside_inputs_and_results():
    """Two temporaries of 40 MiB; the result, as large, is not counted."""
    n = 10 * 2**20
    assert 4 * n * 2 - 2**20 <= extra(zeros, three_times, n) <= 4 * n * 2 + 8 * 2**20 and n > SMALL
