"""Every benchmark runs at toy size and prints its ratios; what they compare is equal. No test depends on time."""

import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from erase_sd.common.errors import UserError
from erase_sd.core.sensitivity import top_k
from eval.speed import BENCHMARKS
from eval.timing import gpu, memory, projection, step, topk
from eval.timing.clock import operations
from eval.timing.fresh import SMALL, extra
from eval.timing.settings import Network, TimingSuite

ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


TOY = ["--widths", "16", "16", "16", "16"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its own process must not reach the processes that later tests start."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # monkeypatch puts back what was there
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process: forget it, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def ran(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "eval.speed", *words]
    return subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)


def ratios(run: subprocess.CompletedProcess) -> list[tuple[str, float]]:
    assert run.returncode == 0, run.stderr
    found = [re.search(r"^(\w+): .* = ([-\d.e+]+) \(", line) for line in run.stdout.splitlines()]
    return [(line[1], float(line[2])) for line in found if line]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["topk", "--scores", "50000", "--tensors", "7"], ["topk"] * 4),
        (["projection", "--parameters", "50000", "--parts", "7"], ["projection"] * 2),
        pytest.param(
            ["step", "caching", *TOY, "--latents", "16", "8", "--cached_latents", "8"],
            ["step"] * 4 + ["caching"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["memory", *TOY, "--job_latents", "8"], ["memory"] * 2, marks=pytest.mark.slow),
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
    assert len(rates) == 5
    assert ours[1:] == pytest.approx([ours[0] / a, ours[0] / b], abs=0.05)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "'nothing' is not one of"),
        (["topk", "--rounds", "0"], "--rounds 0"),
        (["topk", "--share", "2"], "--share 2.0"),
        (["projection", "--parameters", "many"], "'many' is not a whole number"),
        (["step", "--widths", "16", "16"], "--widths 16 16"),
        (["step", "--latents", "64", "12"], "--latents 12"),
        (["memory", "--model_dir", str(ROOT)], "holds other files"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], sentence: str):
    run = ran(*words)
    assert run.returncode == 2
    assert "=" not in run.stdout
    assert run.stderr.startswith("error: ")
    assert sentence in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_help_answers_without_loading_torch():
    code = "import sys; from eval.speed import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == ""
    assert "--scores" in run.stdout


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


@pytest.mark.slow
def test_extra_memory_is_what_was_held_beside_inputs_and_results():
    """Two temporaries of 40 MiB; the result, as large, is not counted."""
    n = 10 * 2**20
    assert 4 * n * 2 - 2**20 <= extra(zeros, three_times, n) <= 4 * n * 2 + 8 * 2**20
    assert n > SMALL


@pytest.mark.slow
def test_redirect_counts_three_backward_passes_and_the_anchors_forward(capsys: pytest.CaptureFixture):
    """Forwards count 1 and backwards 2: 3 + 3 + 3 + 1 against 6."""
    network = Network(widths=(16, 16, 16, 16), latents=(8,))
    found = [
        float(line.rpartition("operations ")[2].rstrip(")")) for line in step.lines(TimingSuite(rounds=1), network)
    ]
    assert found == pytest.approx([1, 10 / 6], rel=0.02)


def test_fused_attention_counts_like_its_matrix_products():
    def work() -> None:
        q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (16, 24, 24))
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    assert operations(work) == counter.get_total_flops() == 3 * 2 * 2 * (2 * 3 * 16 * 24 * 8)


def test_every_benchmark_has_its_file_and_its_word():
    (words,) = typing.get_args(typing.get_type_hints(TimingSuite)["benchmarks"])[:1]
    files = {path.stem for path in (ROOT / "eval" / "timing").glob("*.py")}
    assert set(BENCHMARKS) == set(typing.get_args(words))
    assert set(BENCHMARKS) <= files


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = gpu.lines(TimingSuite(), Network())
    assert line.startswith("gpu: left out")


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs(monkeypatch: pytest.MonkeyPatch):
    """On the CPU, without compiling, and in fewer steps: a rehearsal of everything but the numbers."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "PEAKS", {"": 1.0})
    network = Network(widths=(16, 16, 16, 16), gpu_latents=8, gpu_batch=2)
    lines = list(gpu.measured(TimingSuite(rounds=1), network))
    assert len(compiled) == 1
    assert len(lines) == 4
    assert "% of 1" in lines[0]


def test_the_parameters_of_a_model_folder_are_counted(tiny_sd: Path):
    unet = UNet2DConditionModel.from_pretrained(str(tiny_sd), subfolder="unet")
    assert memory.parameters(tiny_sd) == 4 * sum(p.numel() for p in unet.parameters())


def test_a_kept_model_of_another_size_is_refused(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"block_out_channels": [8, 8, 8, 8], "sample_size": 8}')
    with pytest.raises(UserError, match="name another folder"):
        memory.built(tmp_path, Network(widths=(16, 16, 16, 16), job_latents=8))
