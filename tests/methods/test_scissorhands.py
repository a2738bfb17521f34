"""Scissorhands end to end on tasks small enough to check: what it trims, and that `paper` is Algorithm 1."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from erase_sd import erase
from erase_sd.common.rng import generator
from erase_sd.core.trim import reinitialise_
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingTask
from erase_sd.methods.scissorhands import Scissorhands
from erase_sd.models.parameters import select
from erase_sd.models.pipeline import load
from erase_sd.plan import make
from erase_sd.pocket import FOLDER
from tests.conftest import Alone


class Toy(Alone):
    """4 features, 3 labels; the first layer may be trimmed, the whole network is ranked where asked for."""

    def __init__(self, ranked: bool = False) -> None:
        self.seed, self.everything = 5, ranked
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        for name, p in self.model.named_parameters():
            p.data = torch.randn(p.shape, generator=generator(0, name), dtype=torch.float64)

    def trimmable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name.startswith("0.")}

    def ranked(self) -> dict[str, nn.Parameter]:
        return self.trainable() if self.everything else self.trimmable()

    def batch(self, purpose: str, step: int) -> Tensor:
        return torch.randn(2, 6, 4, generator=generator(self.seed, purpose, step), dtype=torch.float64)

    def _loss(self, x: Tensor, label: int) -> Tensor:
        return F.cross_entropy(self.model(x), torch.full((len(x),), label))

    def forget(self, batch: Tensor) -> Tensor:
        return self._loss(batch[0] + 1, 2)

    def retain(self, batch: Tensor) -> Tensor:
        return self._loss(batch[1], 2)  # conflicts with forgetting: the projection has to bite

    def redirect(self, batch: Tensor) -> Tensor:
        return self._loss(batch[0] + 1, 0)

    def contrast(self, batch: Tensor) -> Tensor:
        return self.forget(batch) - self.redirect(batch)


def test_the_released_saliency_of_classes_is_that_of_the_guided_loss():
    task = Toy()
    task.guided = task.redirect
    theta = dict(task.trimmable())
    expected: dict[str, Tensor] = {}
    for b in range(3):
        g = torch.autograd.grad(task.redirect(task.batch("sensitivity", b)), list(theta.values()))
        for (name, p), x in zip(theta.items(), g, strict=True):
            expected[name] = expected.get(name, 0) + (p.detach() * x).abs() / 3
    generator_of_s = Scissorhands(saliency="guided", sensitivity_batches=3).sensitivity(task)
    try:
        while True:
            next(generator_of_s)
    except StopIteration as end:
        s = end.value
    for name, x in expected.items():
        torch.testing.assert_close(s[name], x.to(s[name].dtype))


def run(method: Scissorhands, task: object) -> tuple[list[dict], dict[str, int]]:
    """(records of the repair, entries changed per parameter)."""
    records = [record for record, _ in method(task)]
    trims = [record["changed"] for record in records if record.get("phase") == "trim"]
    assert len(trims) == 1
    return [record for record in records if "phase" not in record], trims[0]


def weights(task: object) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.model.named_parameters()}


def by_hand(task: Toy, knobs: Scissorhands) -> list[float]:
    """Eq. 1-2, the trim and Algorithm 1 on concatenated float64 gradients; returns the coefficients c."""
    theta = list(task.trainable().values())

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, theta)])

    batches = range(knobs.sensitivity_batches)
    g = sum(flat(task.forget(task.batch("sensitivity", b))) for b in batches) / len(batches)
    s = g * torch.cat([p.detach().reshape(-1) for p in theta])
    size = sum(p.numel() for p in task.ranked().values())  # the ranked ones come first
    chosen = torch.zeros(len(s), dtype=torch.bool)
    chosen[s[:size].argsort(descending=True)[: round(knobs.fraction * size)]] = True
    sizes = [p.numel() for p in theta]
    masks = {n: m.view_as(p) for (n, p), m in zip(task.trainable().items(), chosen.split(sizes), strict=True)}
    reinitialise_(task.trimmable(), masks, "uniform", task.seed)
    coefficients = []
    for step in range(knobs.steps):
        batch = task.batch("repair", step)
        g_f = flat(task.forget(batch))
        g_o = flat(task.retain(batch) - knobs.lam * task.forget(batch))
        v = max(0.0, float(g_o @ g_f / (g_f @ g_f)))
        coefficients.append(knobs.lam + v)
        with torch.no_grad():
            for p, part in zip(theta, (g_o - v * g_f).split(sizes), strict=True):
                p -= knobs.lr * part.view_as(p)
    return coefficients


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_the_paper_preset_is_algorithm_1(ranked: bool, lam: float) -> None:
    method = make(concept="x", preset="paper", fraction=0.2, steps=15, lr=0.1, lam=lam).method
    ours, reference = Toy(ranked), Toy(ranked)
    records, _ = run(method, ours)
    assert [r["c"] for r in records] == pytest.approx(by_hand(reference, method), rel=1e-5)
    for name, p in weights(reference).items():
        torch.testing.assert_close(weights(ours)[name], p, rtol=1e-6, atol=1e-8)
    assert any(r["bit"] for r in records)


@pytest.mark.parametrize("saliency", ["abs", "signed", "summed", "contrast"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_exactly_that_many_entries_change(saliency: str, fraction: float) -> None:
    task = Toy()
    before = weights(task)
    _, changed = run(Scissorhands(fraction=fraction, saliency=saliency, steps=0), task)
    moved = {name: int((p != before[name]).sum()) for name, p in weights(task).items()}
    assert sum(changed.values()) == round(fraction * 30)
    assert all(moved[name] == changed.get(name, 0) for name in moved)


def test_ranking_among_all_trims_only_what_may_be_trimmed() -> None:
    task = Toy(ranked=True)
    before = weights(task)
    _, changed = run(Scissorhands(fraction=0.5, steps=0), task)
    assert set(changed) == set(task.trimmable())
    assert 0 < sum(changed.values()) <= round(0.5 * 51)
    assert all(torch.equal(p, before[name]) for name, p in weights(task).items() if name not in changed)


def test_the_strict_rule_leaves_ties_out() -> None:
    tied = Toy()
    for p in tied.model.parameters():
        p.data.zero_()  # every score is 0
    _, exact = run(Scissorhands(fraction=0.5, steps=0, init="ones", saliency="abs"), tied)
    for p in tied.model.parameters():
        p.data.zero_()
    _, strict = run(Scissorhands(fraction=0.5, steps=0, init="ones", saliency="abs", strict=True), tied)
    assert sum(strict.values()) == 0 < sum(exact.values())


def test_fraction_0_is_no_trim_and_needs_no_gradient() -> None:
    task = Toy()
    task.backward = lambda loss: pytest.fail("a gradient was computed")
    before = weights(task)
    assert run(Scissorhands(fraction=0, steps=0, sensitivity_batches=0), task) == ([], {})
    assert all(torch.equal(p, before[name]) for name, p in weights(task).items())


@pytest.mark.parametrize("saliency", ["abs", "summed", "contrast"])
def test_it_resumes_after_any_batch_the_trim_and_any_step(saliency: str) -> None:
    method = Scissorhands(fraction=0.3, steps=6, lr=0.05, optimizer="adamw", sensitivity_batches=3, saliency=saliency)
    whole = Toy()
    yielded = len(list(method(whole)))
    assert yielded == {"contrast": 9}.get(saliency, 3) + 1 + 6
    for stop in range(1, yielded):
        task, again = Toy(), Toy()
        *_, (_, state) = itertools.islice(method(task), stop)
        state = {k: {n: x.clone() for n, x in v.items()} if isinstance(v, dict) else v for k, v in state.items()}
        again.model.load_state_dict(task.model.state_dict())
        assert len(list(method(again, state))) == yielded - stop
        assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(again).items())


def denoising(pipe: StableDiffusionPipeline, plan: object) -> DenoisingTask:
    rng = generator(0, "made up")
    samples = Samples(
        forget=torch.randn(4, 4, 8, 8, generator=rng),
        retain=torch.randn(4, 4, 8, 8, generator=rng),
        caption=torch.tensor([1, 1, 1, 1]),
        anchor=torch.tensor([2, 2, 2, 2]),
        keep=torch.tensor([3, 3, 3, 3]),
        embeddings={"encoder_hidden_states": torch.randn(4, 77, 32, generator=rng)},
        empty=0,
    )
    return DenoisingTask(pipe, samples, plan.losses, 0, Accelerator(cpu=True))


@pytest.mark.parametrize("preset", ["authors-nsfw", "authors-cls"])
def test_the_authors_presets_reinitialise_two_self_attentions_only(
    tiny_pipe: StableDiffusionPipeline, preset: str
) -> None:
    plan = make(concept="x", preset=preset, steps=0, sensitivity_batches=1, batch_size=1, fraction=0.05)
    task = denoising(tiny_pipe, plan)
    before = weights(task)
    _, changed = run(plan.method, task)
    assert set(changed) == set(select(tiny_pipe.unet, "authors"))
    assert len(changed) == 10
    assert all(".attn1." in name and name.startswith(("up_blocks.1.", "up_blocks.2.")) for name in changed)
    moved = {name for name, p in weights(task).items() if not torch.equal(p, before[name])}
    assert moved <= set(changed)
    assert moved
    assert sum(changed.values()) < 0.05 * sum(p.numel() for p in before.values())  # ranked among all


def test_a_fraction_of_the_unets_attention(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    plan = make(concept="x", preset="sd", steps=0, sensitivity_batches=1, batch_size=1, fraction=0.01)
    task = denoising(tiny_pipe, plan)
    before = weights(task)
    _, changed = run(plan.method, task)
    size = sum(p.numel() for p in select(tiny_pipe.unet, "attn").values())
    assert round(0.01 * size) - sum(changed.values()) in (0, 1, 2)  # a bias that was 0 stays 0
    assert all(torch.equal(p, before[name]) for name, p in weights(task).items() if not changed.get(name))


@pytest.mark.slow
def test_the_paper_preset_has_a_rate_at_which_sgd_moves_the_weights(tmp_path: Path) -> None:
    """On the embedded model; at Adam's rate of 1e-5 the retain loss stays where the trim left it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sizes = {"steps": 25, "forget_images": 32, "retain_images": 48, "sample_steps": 10, "sensitivity_batches": 2}
    erase(load(str(FOLDER)), "cat", preset="paper", score=False, output_dir=tmp_path / "run", **sizes)
    with open(tmp_path / "run/trace.csv") as file:
        rows = [float(row["loss_r"]) for row in csv.DictReader(file)]
    assert sum(rows[-5:]) / 5 < 0.5 * rows[0]
