"""What every method of the registry owes: it forgets, stays finite, moves only what it may, and repeats itself.

A method that is added to METHODS is tested here at once, on the pocket model and pictures drawn in few steps. L_f, the
loss of the concept's pictures under its captions, is 0.13 before, and 0.19 under the anchors' captions.
"""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor

from erase_sd import api as erase
from erase_sd.common.cli import names
from erase_sd.denoising import concept as subject
from erase_sd.denoising.samples import Samples, collect
from erase_sd.denoising.task import DenoisingBatch, DenoisingTask
from erase_sd.methods import METHODS
from erase_sd.models.parameters import select
from erase_sd.models.pipeline import load
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER
from erase_sd.presets import PRESETS
from erase_sd.settings import Sampling

QUICK = {"steps": 12, "lr": 2e-4, "warmup_steps": 0, "sensitivity_batches": 2, "fraction": 5e-4, "batch_size": 8}
LARGER = {  # where few weights are trained, something holds them back, or L_f hardly sees it (redirect at high noise)
    "scissorhands": {"steps": 20},
    "esd": {"lr": 1e-3},
    "concept-ablation": {"lr": 3e-3, "steps": 20},
    "erasediff": {"lr": 1e-3},
    "selective-amnesia": {"lr": 1e-3, "lam": 1.0, "fisher_batches": 2, "steps": 20},
}
KEEPS = {"finetune"}  # forgets only what it never sees again, which takes thousands of steps
FEW = Sampling(forget_images=24, retain_images=24, sample_steps=8, sample_guidance=3.5, anchor_pictures=True)
GUIDES = {"sld"}  # moves no weight: the network carries a hook


def quick(method: str, **more: object) -> Plan:
    """The pocket preset with fewer and larger steps, where it has steps."""
    known = names(METHODS[method]) | {"batch_size"}
    knobs = {k: v for k, v in (QUICK | LARGER.get(method, {})).items() if k in known}
    return make(concept="cat", model="pocket", method=method, **knobs | more)


@pytest.fixture(scope="module")
def samples() -> Samples:
    asked = subject.resolve(quick("scissorhands").job)
    return collect(load(str(FOLDER)), asked.sources, FEW, 0, "", None)


class Run:
    """A method at work on a fresh model."""

    def __init__(self, plan: Plan, samples: Samples) -> None:
        self.pipe: StableDiffusionPipeline = load(str(FOLDER))
        self.task = DenoisingTask(self.pipe, samples, plan.losses, 0, Accelerator(cpu=True))
        self.before = self.losses(), self.weights()
        self.records, self.state = [], None
        for record, state in plan.method(self.task):
            if state is not None:
                self.records.append(record)
                self.state = state
        self.after = self.losses(), self.weights()

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """(L_f, L_r) over 64 samples each."""
        batches = [self.task.batch("check", i) for i in range(8)]
        return tuple(sum(float(loss(b)) for b in batches) / 8 for loss in (self.forget, self.task.retain))

    def forget(self, b: DenoisingBatch) -> Tensor:
        """L_f as a pipeline meets it: asked with and without the caption at once, as guidance needs it."""
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
        assert forget_after > forget + (0.005 if method in GUIDES else 0.02)  # guidance multiplies what a hook does


def test_it_stays_finite(done: tuple[str, Run]) -> None:
    _, run = done
    assert all(x.isfinite().all() for x in run.after[1].values())
    numbers = [x for r in run.records for k, x in r.items() if k.startswith("loss") or k == "step"]
    assert numbers and all(abs(x) < 1e3 for x in numbers)


def test_it_moves_only_what_it_may(done: tuple[str, Run]) -> None:
    method, run = done
    moved = {name for name, x in run.after[1].items() if not torch.equal(x, run.before[1][name])}
    assert bool(moved) == (method not in GUIDES) and moved <= {*run.task.trainable(), *run.task.trimmable()}


def test_the_same_seed_gives_the_same_weights(done: tuple[str, Run], samples: Samples) -> None:
    method, run = done
    torch.rand(3)  # moves the global generator, which must not matter
    before = torch.get_rng_state()
    again = Run(quick(method), samples)
    assert all(torch.equal(x, run.after[1][name]) for name, x in again.after[1].items())
    assert torch.equal(torch.get_rng_state(), before)


def test_after_its_last_state_it_has_nothing_to_do(done: tuple[str, Run]) -> None:
    method, run = done
    assert run.state["step"] == getattr(quick(method).method, "steps", 1)
    assert not list(quick(method).method(run.task, run.state))


@pytest.mark.parametrize("method", METHODS)
def test_the_main_job_carries_it_out(method: str, tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    sizes = {"forget_images": 2, "retain_images": 2, "sample_steps": 2, "batch_size": 2, "steps": 2}
    known = {*names(METHODS[method]), *names(Sampling), "batch_size"}
    knobs = {name: value for name, value in sizes.items() if name in known}
    record = erase(tiny_pipe, "cat", method, output_dir=tmp_path / "run", **knobs)
    assert record["trace"]["steps"] == knobs.get("steps", 1) and record["config"]["method"] == method
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "complete"
    assert (tmp_path / "run/saliency.csv").is_file() == (record["reinitialised"] > 0)
    assert (tmp_path / "run/trace.png").is_file() == (method not in GUIDES)
    assert f"Method `{method}`" in (tmp_path / "run/README.md").read_text()


def test_every_method_has_presets_for_both_models_and_says_what_it_trains() -> None:
    for method in METHODS:
        assert {"sd", "pocket"} <= set(PRESETS[method])
        for preset in ("sd", "pocket"):
            plan = make(concept="cat", method=method, preset=preset)
            assert select(load(str(FOLDER)).unet, plan.losses.train_scope)
