"""Memory by itself: a simulated card, a teacher that computes as its student, answers in the original's place."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from erase_sd import erase
from erase_sd.common import processes
from erase_sd.common.errors import UserError
from erase_sd.common.processes import accelerator, best_precision
from erase_sd.common.rng import generator
from erase_sd.core import repair
from erase_sd.denoising import concept
from erase_sd.denoising import task as denoising_task
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingTask
from erase_sd.models import pipeline
from erase_sd.models.families import network
from erase_sd.models.pipeline import encode, load, sample
from erase_sd.plan import make
from erase_sd.run.record import weights_hash
from erase_sd.settings import TaskSettings
from tests.denoising.test_task import made_up

QUICK = {"preset": "sd", "steps": 2, "batch_size": 4, "sensitivity_batches": 1, "checkpointing_steps": 1}
QUICK |= {"optimizer": "sgd", "lr": 1e-3, "redirect_draws": 1}
QUICK |= {"forget_images": 4, "retain_images": 4, "sample_steps": 2, "picture_steps": 2}
CAPTIONS = ["", "a cat", "a dog", "a tree"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process: forget it, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, bool], bool]], None]:
    """card(fits): a device that has memory for n samples, with checkpointing or without, where fits(n, it) is true."""

    def limited(fits: Callable[[int, bool], bool]) -> None:
        output, sample_batch = DenoisingTask._output, pipeline.sample_batch

        def small(self: DenoisingTask, call: Callable, dtype: torch.dtype, x_t: Tensor, *args: object) -> Tensor:
            if not fits(len(x_t), self.network.is_gradient_checkpointing):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
            return output(self, call, dtype, x_t, *args)

        def few(pipe: DiffusionPipeline, prompts: list[str], *args: object, **more: object) -> object:
            if not fits(len(prompts), False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
            return sample_batch(pipe, prompts, *args, **more)

        monkeypatch.setattr(DenoisingTask, "_output", small)
        monkeypatch.setattr(pipeline, "sample_batch", few)

    return limited


@pytest.mark.slow
def test_a_small_card_finds_its_micro_batch_and_ends_in_the_same_weights(
    tiny_sd: Path, tmp_path: Path, card: Callable
) -> None:
    known = load(str(tiny_sd))
    record = erase(known, "cat", gradient_accumulation_steps=4, sample_batch_size=1, **QUICK)
    assert record["micro_batch"] == 1
    card(lambda n, checkpointing: n <= 1)
    small = load(str(tiny_sd))
    record = erase(small, "cat", output_dir=tmp_path / "run", **QUICK)
    assert record["micro_batch"] == 1
    assert record["trace"]["steps"] == 2
    assert weights_hash(small.unet) == weights_hash(known.unet)
    again = erase(load(str(tiny_sd)), "cat", output_dir=tmp_path / "run", gradient_accumulation_steps=2, **QUICK)
    assert again["trace"]["steps"] == 2  # what changes no result makes no other run of a folder


def test_checkpointing_comes_where_not_even_one_sample_fits(tiny_sd: Path, card: Callable) -> None:
    def loaded() -> DenoisingTask:
        return DenoisingTask(load(str(tiny_sd)), made_up(), TaskSettings(batch_size=2), 0, Accelerator(cpu=True))

    whole, small = loaded(), loaded()
    expected = denoising_task.fitted(whole, lambda: gradient(whole))
    card(lambda n, checkpointing: checkpointing)
    found = denoising_task.fitted(small, lambda: gradient(small))
    assert small.network.is_gradient_checkpointing
    assert small.micro_batch == 1
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-6)


def gradient(task: DenoisingTask) -> dict[str, Tensor]:
    for part in task.micro_batches(task.batch("repair", 0)):
        task.backward(part.share * task.retain(part.batch))
    return {name: p.grad.clone() for name, p in task.trainable().items()}


def test_a_card_that_is_too_small_is_one_sentence_that_names_the_way(tiny_pipe: object, card: Callable) -> None:
    task = DenoisingTask(tiny_pipe, made_up(), TaskSettings(batch_size=2), 0, Accelerator(cpu=True))
    card(lambda n, checkpointing: False)
    with pytest.raises(UserError, match="unet is too large.*one sample at a time: give --low_memory"):
        denoising_task.fitted(task, lambda: gradient(task))


def test_no_memory_for_the_optimizer_is_one_sentence(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")

    monkeypatch.setattr(concept.Target, "preview", lambda *args: concept.Preview([], [], None))
    monkeypatch.setattr(repair, "apply", full)
    with pytest.raises(UserError, match="optimizer's state are too large.*--low_memory"):
        erase(tiny_pipe, "cat", **QUICK)


def test_pictures_are_the_same_in_smaller_batches_and_none_is_lost(tiny_pipe: object, card: Callable) -> None:
    how = {"steps": 2, "guidance": 2.0, "output_type": "latent"}
    whole = sample(tiny_pipe, CAPTIONS, [1, 2, 3, 4], **how)
    card(lambda n, checkpointing: n <= 1)
    for one, two in zip(whole, sample(tiny_pipe, CAPTIONS, [1, 2, 3, 4], **how), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    card(lambda n, checkpointing: n < 1)
    with pytest.raises(UserError, match="not one image at a time"):
        sample(tiny_pipe, CAPTIONS, [1, 2, 3, 4], **how)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_student_and_teacher_are_equal_before_any_change(
    request: pytest.FixtureRequest, model: str, dtype: torch.dtype, mixed_precision: str
) -> None:
    pipe = load(str(request.getfixturevalue(model)))
    z = torch.randn(2, 4, 8, 8, generator=generator(0, "latents"))
    rows = torch.arange(2)
    samples = Samples(z, z, rows + 1, rows + 2, rows + 1, encode(pipe, CAPTIONS, 2.0), 0)
    network(pipe).to(dtype)
    settings = TaskSettings(batch_size=2, trim_scope="full", drop_captions=0.0)
    task = DenoisingTask(pipe, samples, settings, 0, Accelerator(cpu=True, mixed_precision=mixed_precision))
    loss = task.preserve(task.batch("repair", 0))
    assert loss.item() == 0
    with torch.no_grad():
        for p in task.trainable().values():
            p.add_(0.1)
    assert task.preserve(task.batch("repair", 0)).item() > 0


def test_answers_that_were_asked_beforehand_are_those_of_a_copy(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concept.Target, "preview", lambda *args: concept.Preview([], [], None))
    lean = {"weights_dtype": "bfloat16", "rounding": "kahan"}
    beside = load(str(tiny_sd))
    erase(beside, "cat", **QUICK | lean)
    monkeypatch.setattr(denoising_task, "frozen_copy", lambda *args: pytest.fail("the original model was copied"))
    alone = load(str(tiny_sd))
    record = erase(alone, "cat", low_memory=True, **QUICK)
    assert weights_hash(alone.unet) == weights_hash(beside.unet)
    assert record["config"]["weights_dtype"] == "bfloat16"


def test_a_question_that_was_not_foreseen_is_refused(tiny_pipe: StableDiffusionPipeline) -> None:
    task = DenoisingTask(tiny_pipe, made_up(), TaskSettings(batch_size=2), 0, Accelerator(cpu=True), beforehand=True)
    task.ask_beforehand(lambda task, batch, step: task.redirect(batch), 1)
    assert task.redirect(task.batch("repair", 0)) > 0
    with pytest.raises(UserError, match="leave out --low_memory"):
        task.redirect(task.batch("repair", 1))


def test_low_memory_is_bf16_in_two_halves_and_8_bit_moments() -> None:
    plan = make(concept="cat", model="pocket", low_memory=True)
    assert plan.job.weights_dtype == "bfloat16"
    assert plan.method.rounding == "kahan"
    assert plan.method.optimizer == "adamw8bit"
    assert plan.method.projection == "on"
    kept = make(concept="cat", low_memory=True, optimizer="sgd", rounding="stochastic")
    assert kept.method.optimizer == "sgd"
    assert kept.method.rounding == "stochastic"
    assert make(concept="cat", method="uce", low_memory=True).job.weights_dtype == "bfloat16"
    assert "low_memory" not in plan.config()  # its effects are there, by their own names


def test_low_memory_without_bitsandbytes_is_one_sentence(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--low_memory keeps Adam's moments in 8 bits: .* needs bitsandbytes"):
        erase(tiny_pipe, "cat", low_memory=True)


def test_gradients_of_bf16_weights_add_up_in_fp32(tiny_pipe: StableDiffusionPipeline) -> None:
    tiny_pipe.unet.to(torch.bfloat16)
    task = DenoisingTask(tiny_pipe, made_up(), TaskSettings(batch_size=2), 0, Accelerator(cpu=True))
    task.backward(task.retain(task.batch("repair", 0)))
    assert {p.grad.dtype for p in task.trainable().values()} == {torch.float32}
    task.release()


def test_optimizer_and_teacher_are_gone_before_the_pictures_after(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref] = []
    seen: list[list[object]] = []
    make_optimizer, frozen_copy = repair.make_optimizer, denoising_task.frozen_copy

    def optimizer(*args: object) -> object:
        made = make_optimizer(*args)
        held.append(weakref.ref(made))
        return made

    def teacher(*args: object) -> object:
        made = frozen_copy(*args)
        held.append(weakref.ref(made))
        return made

    def preview(self: concept.Target, pipe: object, digest: str, cache: object, when: str) -> concept.Preview:
        gc.collect()
        if when == "after":
            seen.append([ref() for ref in held])
        return concept.Preview([], [], None)

    monkeypatch.setattr(repair, "make_optimizer", optimizer)
    monkeypatch.setattr(denoising_task, "frozen_copy", teacher)
    monkeypatch.setattr(concept.Target, "preview", preview)
    erase(tiny_pipe, "cat", **QUICK | {"optimizer": "adamw"})
    assert seen == [[None, None]]


def test_fp16_is_refused_wherever_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="fp16.*give bf16"):
        accelerator("fp16")
    monkeypatch.setenv(processes.PRECISION, "fp16")
    with pytest.raises(UserError, match="fp16.*give bf16"):
        accelerator(None)


@pytest.mark.parametrize(
    ("asked", "configured", "supported", "found"),
    [
        (None, None, True, "bf16"),
        (None, None, False, None),
        ("no", None, True, "no"),
        (None, "no", True, None),
    ],
)
def test_bf16_is_the_default_of_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, configured: str | None, supported: bool, found: str | None
) -> None:
    monkeypatch.delenv(processes.PRECISION, raising=False)
    assert best_precision(None) is None  # no GPU
    if configured:
        monkeypatch.setenv(processes.PRECISION, configured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert best_precision(asked) == found
