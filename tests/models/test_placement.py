"""What a run holds in memory while it trains: which parts, in which precision, with which activations."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from erase_sd import api, erase
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.denoising import concept
from erase_sd.denoising import task as denoising_task
from erase_sd.denoising.task import DenoisingTask
from erase_sd.models import placement
from erase_sd.models.families import modules, network
from erase_sd.models.pipeline import encode, load, sample
from erase_sd.models.placement import drawing, half_precision, placed, training
from erase_sd.plan import make
from erase_sd.run import loop
from erase_sd.run.record import weights_hash

QUICK = {
    "preset": "paper",
    "steps": 3,
    "lr": 1e-4,
    "batch_size": 2,
    "sensitivity_batches": 1,
    "checkpointing_steps": 1,
}
QUICK |= {"forget_images": 2, "retain_images": 2, "sample_steps": 2, "picture_steps": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def gradients(unet: nn.Module) -> tuple[dict[str, Tensor], int]:
    """The gradient of one denoising loss, and the bytes that the forward pass keeps for it."""
    rng = generator(0, "placement")
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=rng)
    cond = torch.randn(2, 77, 32, generator=rng)
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss = nn.functional.mse_loss(unet(x, torch.tensor([3, 700]), cond).sample, noise)
    loss.backward()
    g = {name: p.grad.clone() for name, p in unet.named_parameters()}
    unet.zero_grad(set_to_none=True)
    return g, sum(kept.values()) - sum(p.nbytes for p in unet.parameters() if p.data_ptr() in kept)


def test_gradient_checkpointing_changes_memory_and_no_gradient(tiny_pipe: StableDiffusionPipeline) -> None:
    unet = tiny_pipe.unet
    plain, kept = gradients(unet)
    with training(unet, [], CPU, torch.float32, checkpointing=True):
        assert unet.is_gradient_checkpointing
        again, fewer = gradients(unet)
    assert not unet.is_gradient_checkpointing
    assert all((plain[name] - again[name]).abs().max() <= 1e-6 * plain[name].abs().max() for name in plain)
    assert fewer < 0.2 * kept


def test_the_job_trains_with_checkpointing_and_the_result_is_the_same(
    tiny_sd: Path, tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = [], loop.run

    def spy(method: object, task: DenoisingTask, *args: object, **options: object) -> object:
        seen.append(task.model.is_gradient_checkpointing)
        return run(method, task, *args, **options)

    monkeypatch.setattr(loop, "run", spy)
    erase(tiny_pipe, "cat", gradient_checkpointing=True, **QUICK)
    other = load(str(tiny_sd))
    erase(other, "cat", **QUICK)
    assert seen == [True, False]
    assert not tiny_pipe.unet.is_gradient_checkpointing
    for p, q in zip(tiny_pipe.unet.parameters(), other.unet.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Part(nn.Linear):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    @property
    def device(self) -> torch.device:
        return CPU

    def to(self, place: torch.device | str) -> nn.Module:
        self.sent.append(str(place))
        return self


def test_only_the_network_stays_on_the_accelerator_while_it_is_trained(tiny_pipe: StableDiffusionPipeline) -> None:
    unet, encoder, meta = tiny_pipe.unet, Part(), torch.device("meta")
    with placed([encoder], meta):
        with training(unet, [unet, encoder], meta, torch.float32, checkpointing=False):
            assert encoder.sent == ["meta", "cpu"] and unet.device == CPU  # the network is left where it is
        assert encoder.sent == ["meta", "cpu", "meta"]
    assert encoder.sent == ["meta", "cpu", "meta", "cpu"]


@pytest.mark.parametrize(
    ("knobs", "copies"),
    [
        ({"preset": "paper"}, 0),
        ({"preset": "paper", "retain_loss": "original"}, 1),
        ({"preset": "authors-nsfw"}, 0),
        ({"preset": "sd"}, 1),
        ({"method": "ascent"}, 0),
        ({"method": "finetune"}, 0),
        ({"method": "salun", "anchor_model": "original"}, 1),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_the_original_network_is_copied_only_where_a_loss_looks_at_it(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, knobs: dict, copies: int
) -> None:
    made, copy = [], denoising_task.frozen_copy

    def counted(model: torch.nn.Module, mixed_precision: str) -> torch.nn.Module:
        made.append(copy(model, mixed_precision))
        return made[-1]

    monkeypatch.setattr(denoising_task, "frozen_copy", counted)
    monkeypatch.setattr(concept.Target, "preview", lambda *args: concept.Preview([], [], None))
    quick = {k: QUICK[k] for k in ("batch_size", "forget_images", "retain_images", "sample_steps")}
    erase(tiny_pipe, "cat", **quick | knobs | {"steps": 1})
    assert len(made) == copies


def test_bf16_weights_are_trained_stored_and_resumed_bit_for_bit(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = QUICK | {"weights_dtype": "bfloat16", "rounding": "kahan"}
    whole = load(str(tiny_sd))
    erase(whole, "cat", output_dir=tmp_path / "whole", **knobs)
    file = load_file(tmp_path / "whole" / WEIGHTS)
    assert all(x.dtype == torch.bfloat16 for x in file.values())
    assert all(p.dtype == torch.float32 and torch.equal(p, file[n]) for n, p in whole.unet.named_parameters())

    show = loop.show

    def interrupt(bar, record):
        if record.get("step") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        erase(load(str(tiny_sd)), "cat", output_dir=tmp_path / "run", **knobs)
    monkeypatch.setattr(loop, "show", show)
    again = load(str(tiny_sd))
    erase(again, "cat", output_dir=tmp_path / "run", **knobs)
    assert weights_hash(again.unet) == weights_hash(whole.unet)


def test_roundings_differ_and_a_bf16_pipeline_stays_one(tiny_sd: Path) -> None:
    results = []
    for rounding in ("nearest", "stochastic", "kahan"):
        pipe = load(str(tiny_sd), dtype=torch.bfloat16)
        erase(pipe, "cat", weights_dtype="bfloat16", rounding=rounding, **QUICK)
        assert pipe.unet.dtype == torch.bfloat16
        results.append(weights_hash(pipe.unet))
    assert all(a != b for a, b in itertools.combinations(results, 2))


def test_a_rounding_of_fp32_weights_is_refused() -> None:
    with pytest.raises(UserError, match="--rounding kahan.*give --weights_dtype bfloat16 too"):
        make(concept="cat", rounding="kahan")


def test_an_optimiser_that_cannot_be_had_is_refused_before_an_image_is_sampled(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concept, "sample", lambda *args, **options: pytest.fail("an image was sampled"))
    with pytest.raises(UserError, match="--optimizer paged-adamw8bit"):  # missing, or without a CUDA device
        erase(tiny_pipe, "cat", optimizer="paged-adamw8bit", **QUICK)


@pytest.mark.parametrize("free", [2**40, 1], ids=["together", "in turns"])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_a_device_draws_in_half_precision_and_leaves_every_part_as_it_was(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, free: int
) -> None:
    monkeypatch.setattr(placement, "half_precision", lambda device: torch.bfloat16)
    monkeypatch.setattr(placement, "free_memory", lambda device: free)
    pipe = load(str(request.getfixturevalue(model)))
    how = {"steps": 2, "guidance": 2.0, "output_type": "latent", "size": 64}
    whole = sample(pipe, ["a cat", "a dog"], [1, 2], **how)
    wide = encode(pipe, ["a cat"])
    parts = list(modules(pipe).values())
    before = {name: weights_hash(part) for name, part in modules(pipe).items()}
    on_stage: list[set[str]] = []
    enter = placement.Stage.enter

    def spied(self: placement.Stage, part: nn.Module, dtype: torch.dtype | None) -> None:
        enter(self, part, dtype)
        on_stage.append({type(one).__name__ for one in self._own})
        assert dtype in (None, torch.bfloat16)
        assert (dtype == torch.bfloat16) == (part is network(pipe))

    monkeypatch.setattr(placement.Stage, "enter", spied)
    with drawing(network(pipe), parts, CPU):
        half = sample(pipe, ["a cat", "a dog"], [1, 2], **how)
        images = sample(pipe, ["a cat"], [1], steps=2, guidance=2.0, size=64)
        narrow = encode(pipe, ["a cat"])
    for one, two in zip(whole, half, strict=True):
        assert not torch.equal(one, two)
        assert torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1] > 0.99
    assert images[0].size == (64, 64)
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)  # captions are encoded as before
    assert max(map(len, on_stage)) == (1 if free == 1 else len({type(part).__name__ for part in parts}))
    assert {name: weights_hash(part) for name, part in modules(pipe).items()} == before
    assert not any(hasattr(part, "_hf_hook") for part in parts)


def test_a_run_draws_in_half_and_trains_in_full(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(str(tiny_sd))
    erase(plain, "cat", fraction=0.0, **QUICK)  # which entries are trimmed would jump
    for place in (placement, api):
        monkeypatch.setattr(place, "half_precision", lambda device: torch.bfloat16)
    monkeypatch.setattr(placement, "free_memory", lambda device: 2**40)
    half = load(str(tiny_sd))
    record = erase(half, "cat", fraction=0.0, **QUICK)
    assert record["trace"]["steps"] == QUICK["steps"]
    assert half.unet.dtype == torch.float32
    one, two = (torch.cat([p.detach().flatten() for p in pipe.unet.parameters()]) for pipe in (plain, half))
    assert (one - two).norm() < 0.1 * one.norm()  # learned from pictures that are a little different


def test_nothing_is_lent_where_there_is_no_half_precision(tiny_pipe: StableDiffusionPipeline) -> None:
    assert half_precision(CPU) is None
    with drawing(tiny_pipe.unet, list(modules(tiny_pipe).values()), CPU):
        assert not hasattr(tiny_pipe.unet, "_hf_hook")
