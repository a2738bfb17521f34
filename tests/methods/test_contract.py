"""What every method of the registry owes: it forgets, stays finite, moves only what it may, and repeats itself.

A method that is added to the registry is tested here at once, on the pocket model and images sampled in few steps.
L_f, the loss of the concept's images under its captions, is 0.13 before, and 0.19 under the anchors' captions.
"""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor

from erase_sd.api import erase
from erase_sd.common.cli import names
from erase_sd.denoising.concept import resolve
from erase_sd.denoising.samples import Samples, collect
from erase_sd.denoising.task import DenoisingBatch, DenoisingTask
from erase_sd.methods import METHODS, PRESETS, REGISTRY, table
from erase_sd.methods.base import Method
from erase_sd.models.parameters import select
from erase_sd.models.pipeline import load
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER
from erase_sd.settings import Sampling

QUICK = {"steps": 12, "lr": 2e-4, "warmup_steps": 0, "sensitivity_batches": 2, "fraction": 5e-4, "batch_size": 8}
LARGER = {  # where few weights are trained, something holds them back, or L_f hardly sees it (redirect at high noise)
    "scissorhands": {"steps": 20},
    "esd": {"lr": 1e-3},
    "concept-ablation": {"lr": 3e-3, "steps": 20},
    "erasediff": {"lr": 1e-3},
    "selective-amnesia": {"lr": 1e-3, "lam": 1.0, "fisher_batches": 2, "steps": 20},
}
# The other methods' jobs differ from these in a formula alone: steps, none, no weights, a state of their own.
DIFFERENT = {"scissorhands", "uce", "sld", "selective-amnesia"}
JOBS = [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
KEEPS = {"finetune"}  # forgets only what it never sees again, which takes thousands of steps
FEW = Sampling(forget_images=24, retain_images=24, sample_steps=8, sample_guidance=3.5, anchor_pictures=True)


def quick(method: str, **more: object) -> Plan:
    """The pocket preset with fewer and larger steps, where it has steps."""
    options = own(method, QUICK | LARGER.get(method, {}))
    return make(concept="cat", model="pocket", method=method, **options | more)


def own(method: str, options: dict) -> dict:
    """Those of the options that a job with this method has."""
    known = {*names(METHODS[method]), *names(Sampling), "batch_size"}
    return {name: value for name, value in options.items() if name in known}


@pytest.fixture(scope="module")
def samples() -> Samples:
    target = resolve(quick("scissorhands").job)
    return collect(load(str(FOLDER)), target.sources, FEW, 0, "", None)


class Run:
    """A method at work on a fresh model."""

    def __init__(self, plan: Plan, samples: Samples, most: int | None = None) -> None:
        self.pipe: StableDiffusionPipeline = load(str(FOLDER))
        self.task = DenoisingTask(self.pipe, samples, plan.losses, 0, Accelerator(cpu=True))
        self.before = self.losses(), self.weights()
        self.records, self.state = [], None
        for record, state in plan.method(self.task):
            if state is not None:
                self.records.append(record)
                self.state = state
            if len(self.records) == most:
                break
        self.after = self.losses(), self.weights()

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """(L_f, L_r) over 64 samples each."""
        forget = retain = 0.0
        for i in range(8):
            batch = self.task.batch("check", i)
            forget += float(self.forget(batch)) / 8
            retain += float(self.task.retain(batch)) / 8
        return forget, retain

    def forget(self, b: DenoisingBatch) -> Tensor:
        """L_f as a pipeline computes it: with and without the caption at once, as guidance needs it."""
        x, nothing = self.task.add_noise(b.z_f, b.noise_f, b.t_f), self.task.empty_cond(len(b.z_f))
        both = {name: torch.cat([nothing[name], b.c_f[name]]) for name in b.c_f}
        answer = self.task.predict(torch.cat([x, x]), torch.cat([b.t_f, b.t_f]), both)[len(x) :]
        return torch.nn.functional.mse_loss(answer, self.task.target(b.z_f, b.noise_f, b.t_f))

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.task.model.named_parameters()}


RUNS: dict[str, Run] = {}


@pytest.fixture(params=METHODS)
def done(request: pytest.FixtureRequest, samples: Samples) -> tuple[str, Run]:
    """(method, its run), made once."""
    if request.param not in RUNS:
        RUNS[request.param] = Run(quick(request.param), samples)
    return request.param, RUNS[request.param]


def test_it_forgets(done: tuple[str, Run]) -> None:
    method, run = done
    (forget, retain), (forget_after, retain_after) = run.before[0], run.after[0]
    if method in KEEPS:
        assert retain_after < retain
    else:
        least = 0.02 if METHODS[method].trains else 0.005  # guidance multiplies what a hook does
        assert forget_after > forget + least


def test_it_stays_finite(done: tuple[str, Run]) -> None:
    _, run = done
    for name, x in run.after[1].items():
        assert x.isfinite().all(), name
    assert run.records
    for record in run.records:
        for name, x in record.items():
            if name.startswith("loss") or name == "step":
                assert abs(x) < 1e3, name


def test_it_moves_only_what_it_may(done: tuple[str, Run]) -> None:
    method, run = done
    moved = {name for name, x in run.after[1].items() if not torch.equal(x, run.before[1][name])}
    assert bool(moved) == METHODS[method].trains
    assert moved <= {*run.task.trainable(), *run.task.trimmable()}


def test_the_same_seed_gives_the_same_steps(done: tuple[str, Run], samples: Samples) -> None:
    """Each step's losses come from the weights of the one before."""
    method, run = done
    torch.rand(3)  # moves the global generator, which must not matter
    before = torch.get_rng_state()
    again = Run(quick(method), samples, most=4)
    assert again.records == run.records[:4]
    assert torch.equal(torch.get_rng_state(), before)


def test_after_its_last_state_it_has_nothing_to_do(done: tuple[str, Run]) -> None:
    method, run = done
    assert run.state["step"] == quick(method).method.steps
    assert not list(quick(method).method(run.task, run.state))


@pytest.mark.parametrize("method", JOBS)
def test_the_main_job_carries_it_out(method: str, tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    sizes = {"forget_images": 2, "retain_images": 2, "sample_steps": 2, "batch_size": 2, "steps": 2}
    options = own(method, sizes)
    record = erase(tiny_pipe, "cat", method, output_dir=tmp_path / "run", **options)
    assert record["trace"]["steps"] == options.get("steps", 1)
    assert record["config"]["method"] == method
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "complete"
    assert (tmp_path / "run/saliency.csv").is_file() == (record["reinitialised"] > 0)
    assert (tmp_path / "run/trace.png").is_file() == (record["trace"]["steps"] > 1)
    assert f"Method `{method}`" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("preset", ["sd", "pocket"])
def test_every_method_has_presets_for_both_models_and_says_what_it_trains(preset: str) -> None:
    unet = load(str(FOLDER)).unet
    for method in METHODS:
        plan = make(concept="cat", method=method, preset=preset)
        assert select(unet, plan.losses.train_scope), method


def test_a_line_of_the_registry_is_a_method_with_presets() -> None:
    assert list(REGISTRY) == list(METHODS) == list(PRESETS)
    for name, cls in METHODS.items():
        assert issubclass(cls, Method), name


def test_the_table_has_a_source_for_every_method() -> None:
    head, rule, *rows = table().splitlines()
    assert len(rows) == len(METHODS)
    for name, row in zip(METHODS, rows, strict=True):
        assert row.startswith(f"| `{name}` | ")
        assert row.count("|") == head.count("|") == rule.count("|")
        assert "https://arxiv.org/abs/" in row


def test_the_table_of_the_documentation_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert table() in page.read_text(encoding="utf-8"), "put what erase_sd.methods.table() returns into it"
