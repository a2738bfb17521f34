"""The four losses against their formulas, and batches that only (seed, purpose, step) decides."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.projection import collapsed, dot
from erase_sd.core.sensitivity import accumulate, connection_sensitivity
from erase_sd.core.task import gradient
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingBatch, DenoisingTask
from erase_sd.settings import TaskSettings

HIDDEN = "encoder_hidden_states"
KNOBS = TaskSettings(batch_size=3, trim_scope="attn", train_scope="full", drop_captions=0.0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process: forget it, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made_up(n: int = 5) -> Samples:
    """Latents and embeddings that no model drew; every sample has a caption of its own."""
    rng = generator(0, "made up")
    return Samples(
        forget=torch.randn(n, 4, 8, 8, generator=rng),
        retain=torch.randn(n, 4, 8, 8, generator=rng),
        caption=torch.arange(n),
        anchor=torch.arange(n, 2 * n),
        keep=torch.arange(2 * n, 3 * n),
        embeddings={HIDDEN: torch.randn(3 * n + 1, 77, 32, generator=rng)},
        empty=3 * n,
    )


def accelerator(ranks: int = 1, rank: int = 0) -> SimpleNamespace:
    """All that batches ask of an accelerator, on one of several ranks."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=ranks,
        process_index=rank,
        mixed_precision="no",
        prepare_model=lambda model: model,
    )


def task(pipe: StableDiffusionPipeline, acc: object = None, **changes: object) -> DenoisingTask:
    return DenoisingTask(pipe, made_up(), replace(KNOBS, **changes), 7, acc or Accelerator(cpu=True))


def noisy(pipe: StableDiffusionPipeline, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = a x0 + s eps and v = a eps - s x0, from the betas of SD v1.4 written out."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a2 = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    a, s = a2.sqrt(), (1 - a2).sqrt()
    return a * x0 + s * noise, a * noise - s * x0


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_denoising_losses_are_their_formulas(tiny_pipe: StableDiffusionPipeline, kind: str) -> None:
    tiny_pipe.scheduler.register_to_config(prediction_type=kind)
    ours, unet = task(tiny_pipe), tiny_pipe.unet
    b = ours.batch("repair", 0)
    x_t, v = noisy(tiny_pipe, b.z_f, b.noise_f, b.t_f)
    target = {"epsilon": b.noise_f, "v_prediction": v, "sample": b.z_f}[kind]
    close(ours.add_noise(b.z_f, b.noise_f, b.t_f), x_t)
    close(ours.target(b.z_f, b.noise_f, b.t_f), target)
    with torch.no_grad():
        concept, anchor = (unet(x_t, b.t_f, **c).sample for c in (b.c_f, b.c_a))
        close(ours.predict(x_t, b.t_f, b.c_f), concept)
        close(ours.forget(b), ((concept - target) ** 2).mean())
        empty = unet(x_t, b.t_f, **ours.empty_cond(len(x_t))).sample
        close(ours.guided(b), ((8.5 * concept - 7.5 * empty - target) ** 2).mean())
        close(sum(ours.contrast(b)), ((concept - target) ** 2).mean() - ((anchor - target) ** 2).mean())
        close(ours.redirect(b), ((concept - anchor) ** 2).mean())
        x_t, v = noisy(tiny_pipe, b.z_r, b.noise_r, b.t_r)
        target = {"epsilon": b.noise_r, "v_prediction": v, "sample": b.z_r}[kind]
        close(ours.retain(b), ((unet(x_t, b.t_r, **b.c_r).sample - target) ** 2).mean())


def disturb(pipe: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator(0, "disturb", name))


def test_the_anchor_comes_from_the_network_that_was_asked_for(tiny_pipe: StableDiffusionPipeline) -> None:
    original, current = task(tiny_pipe, anchor_model="original"), task(tiny_pipe, anchor_model="current")
    assert current.shards.original is None
    b = original.batch("repair", 0)
    x_t, _ = noisy(tiny_pipe, b.z_f, b.noise_f, b.t_f)
    with torch.no_grad():
        old = tiny_pipe.unet(x_t, b.t_f, **b.c_a).sample
        disturb(tiny_pipe)
        concept, new = (tiny_pipe.unet(x_t, b.t_f, **c).sample for c in (b.c_f, b.c_a))
        assert not torch.allclose(old, new, atol=1e-3)
        close(original.redirect(b), F.mse_loss(concept, old))
        close(current.redirect(b), F.mse_loss(concept, new))


@pytest.mark.parametrize("anchor_model", ["original", "current"])
def test_the_anchor_is_a_target_and_gets_no_gradient(tiny_pipe: StableDiffusionPipeline, anchor_model: str) -> None:
    ours = task(tiny_pipe, anchor_model=anchor_model)
    b = ours.batch("repair", 0)
    g = gradient(ours, ours.redirect, b, ours.trainable())
    x_t, _ = noisy(tiny_pipe, b.z_f, b.noise_f, b.t_f)
    with torch.no_grad():
        wanted = tiny_pipe.unet(x_t, b.t_f, **b.c_a).sample
    theta = list(ours.trainable().values())
    by_hand = torch.autograd.grad(F.mse_loss(tiny_pipe.unet(x_t, b.t_f, **b.c_f).sample, wanted), theta)
    for x, y in zip(g.values(), by_hand, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


def test_preserving_the_original_starts_at_zero(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe)
    b = ours.batch("repair", 0)
    assert ours.preserve(b).item() == 0
    assert all(not g.any() for g in gradient(ours, ours.preserve, b, ours.trainable()).values())
    disturb(tiny_pipe)
    assert ours.preserve(b).item() > 1e-4


def test_preserving_needs_the_original(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe, anchor_model="current")
    with pytest.raises(UserError, match="anchor_model original"):
        ours.preserve(ours.batch("repair", 0))


def rows(batch: DenoisingBatch) -> list[tuple[Tensor, ...]]:
    """Every sample of a batch, all that belongs to it."""
    columns = [tuple(x.values()) if isinstance(x, dict) else (x,) for x in batch if x is not None]
    return list(zip(*(x for column in columns for x in column), strict=True))


@pytest.mark.parametrize("step", [0, 3])
def test_ranks_share_out_the_same_global_batch(tiny_pipe: StableDiffusionPipeline, step: int) -> None:
    whole = rows(task(tiny_pipe, accelerator(), batch_size=5).batch("repair", step))
    for ranks in (2, 3):
        parts = [task(tiny_pipe, accelerator(ranks, r), batch_size=5).batch("repair", step) for r in range(ranks)]
        dealt = [rows(parts[i % ranks])[i // ranks] for i in range(5)]
        assert sum(len(part.z_f) for part in parts) == 5
        for one, two in zip(whole, dealt, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_a_batch_depends_on_seed_purpose_and_step_alone(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe, accelerator())
    first = ours.batch("repair", 4)
    torch.rand(17)  # moves the global generator, which must not matter
    before = torch.get_rng_state()
    again = ours.batch("repair", 4)
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(rows(first), rows(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    seed = DenoisingTask(tiny_pipe, made_up(), KNOBS, 8, accelerator())
    for other in (ours.batch("repair", 5), ours.batch("sensitivity", 4), seed.batch("repair", 4)):
        assert not torch.equal(first.noise_f, other.noise_f)
        assert not torch.equal(first.noise_r, other.noise_r)


def test_draws_cover_all_samples_and_timesteps(tiny_pipe: StableDiffusionPipeline) -> None:
    ours, samples = task(tiny_pipe, accelerator(), batch_size=300, drop_captions=0.2), made_up()
    b = ours.batch("repair", 0)
    for z, all_z in ((b.z_f, samples.forget), (b.z_r, samples.retain)):
        assert all((z == x).flatten(1).all(1).any() for x in all_z)
    for t in (b.t_f, b.t_r):
        assert t.min() >= 0
        assert t.max() <= 999
        assert abs(t.float().mean() - 499.5) < 60
    assert abs(b.noise_f.mean()) < 0.02
    assert abs(b.noise_f.std() - 1) < 0.02
    assert not torch.equal(b.t_f, b.t_r)
    table, (c_f, c_a, c_r) = samples.embeddings[HIDDEN], (c[HIDDEN] for c in (b.c_f, b.c_a, b.c_r))
    dropped = (c_r == table[samples.empty]).flatten(1).all(1).float().mean()
    assert 0.12 < dropped < 0.28
    picture = [int((samples.forget == z).flatten(1).all(1).nonzero()) for z in b.z_f]
    assert torch.equal(c_f, table[samples.caption[picture]])
    assert torch.equal(c_a, table[samples.anchor[picture]])


def test_scopes(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe, trim_scope="full", train_scope="kv")
    assert all(name.split(".")[-2] in ("to_k", "to_v") for name in ours.trainable())
    assert ours.ranked() == ours.trimmable() == ours.trainable()  # what is trimmed is trained
    assert not any("norm" in name for name in ours.trimmable())
    assert all(p.requires_grad for p in ours.trimmable().values())
    wide = task(tiny_pipe, trim_scope="authors", rank_scope="full", train_scope="full")
    assert len(wide.ranked()) == len(list(tiny_pipe.unet.parameters()))
    assert len(wide.trimmable()) == 10
    assert all(".attn1." in name for name in wide.trimmable())
    with pytest.raises(UserError, match="unknown parameter group 'everything'"):
        task(tiny_pipe, trim_scope="everything")


def test_accumulation_gives_the_gradients_and_c_of_the_whole_batch(tiny_pipe: StableDiffusionPipeline) -> None:
    found = {}
    for n in (1, 4):
        ours = task(tiny_pipe, batch_size=6, gradient_accumulation_steps=n)
        theta, b = ours.trainable(), ours.batch("repair", 0)
        assert [len(part.batch.z_f) for part in ours.micro_batches(b)] == {1: [6], 4: [1, 2, 1, 2]}[n]
        g_f, g_r = gradient(ours, ours.forget, b, theta), gradient(ours, ours.retain, b, theta)
        found[n] = g_f, g_r, collapsed(float(dot(g_r, g_f)), float(dot(g_f, g_f)), 0.0)
        ours.release()
    for one, four in zip(found[1][:2], found[4][:2], strict=True):
        difference = {name: one[name] - four[name] for name in one}
        assert dot(difference, difference) < 1e-10 * dot(one, one)
    assert found[1][2] > 0.01
    assert found[4][2] == pytest.approx(found[1][2], rel=1e-5)


def test_micro_batches_must_not_be_empty(tiny_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(UserError, match="give 4 or more"):
        task(tiny_pipe, accelerator(2), batch_size=3, gradient_accumulation_steps=2)


def measured(pipe: StableDiffusionPipeline, precision: str) -> tuple[dict, dict, float]:
    """Sensitivity, forget gradient and coefficient c of one step, under one mixed precision."""
    ours = task(pipe, Accelerator(cpu=True, mixed_precision=precision), batch_size=4)
    try:
        theta = ours.trainable()
        *_, mean = accumulate(ours, ours.forget, theta, "sensitivity", range(2))
        s = {name: x.clone() for name, x in connection_sensitivity(theta, mean).items()}
        b = ours.batch("repair", 0)
        g_f, g_r = gradient(ours, ours.forget, b, theta), gradient(ours, ours.retain, b, theta)
        return s, g_f, collapsed(float(dot(g_r, g_f)), float(dot(g_f, g_f)), 0.0)
    finally:
        ours.release()


def test_bf16_keeps_sensitivity_and_gradients_in_fp32_and_c_within_5_percent(
    tiny_pipe: StableDiffusionPipeline,
) -> None:
    s32, g32, c32 = measured(tiny_pipe, "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    s16, g16, c16 = measured(tiny_pipe, "bf16")
    assert all(x.dtype == torch.float32 for group in (s16, g16) for x in group.values())
    assert all(p.dtype == torch.float32 for p in tiny_pipe.unet.parameters())
    assert any(not torch.equal(g32[name], g16[name]) for name in g32)  # autocast was really on
    assert c32 > 0.01
    assert c16 == pytest.approx(c32, rel=0.05)
    cosine = dot(s32, s16) / (dot(s32, s32) * dot(s16, s16)).sqrt()
    assert cosine > 0.99


def test_release_leaves_the_model_as_it_was(tiny_pipe: StableDiffusionPipeline) -> None:
    unet, before = tiny_pipe.unet, dict(tiny_pipe.unet.__dict__)
    ours = task(tiny_pipe, Accelerator(cpu=True, mixed_precision="bf16"))
    ours.backward(ours.forget(ours.batch("repair", 0)))
    ours.release()
    assert set(unet.__dict__) == set(before)
    assert unet.forward.__func__ is type(unet).forward
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())


def test_redirect_is_fitted_on_the_anchors_pictures_too(tiny_pipe: StableDiffusionPipeline) -> None:
    samples = made_up()
    samples = samples._replace(anchors=samples.forget + 100)
    ours = DenoisingTask(tiny_pipe, samples, replace(KNOBS, batch_size=32), 7, Accelerator(cpu=True))
    batch = ours.batch("repair", 0)
    swapped = (batch.z_d - batch.z_f).flatten(1).mean(1)
    assert set(swapped.round().tolist()) == {0.0, 100.0}
    assert 4 < (swapped > 50).sum() < 28
    plain = task(tiny_pipe, batch_size=32).batch("repair", 0)
    assert torch.equal(plain.z_d, plain.z_f)
    assert torch.equal(plain.z_f, batch.z_f)


def test_redirect_may_be_fitted_where_it_is_noisy(tiny_pipe: StableDiffusionPipeline) -> None:
    plain, noisiest = (task(tiny_pipe, batch_size=256, redirect_draws=k).batch("repair", 0) for k in (1, 3))
    assert torch.equal(plain.t_d, plain.t_f)
    for column in ("z_f", "t_f", "noise_f", "z_r", "t_r", "noise_r", "z_d"):  # all other draws are as they were
        assert torch.equal(getattr(plain, column), getattr(noisiest, column))
    u = noisiest.t_d.double().div(1000).sort().values  # the noisiest of three: P(u < x) = x^3
    assert (noisiest.t_d >= plain.t_f).all()
    assert noisiest.t_d.max() < 1000
    assert (u**3 - torch.arange(256) / 256).abs().max() < 1.63 / 16  # Kolmogorov and Smirnov at 1 %


def test_redirect_looks_at_its_own_timesteps(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe, redirect_draws=3)
    b = ours.batch("repair", 0)
    assert (b.t_d > b.t_f).any()
    x_t, _ = noisy(tiny_pipe, b.z_d, b.noise_f, b.t_d)
    with torch.no_grad():
        concept, anchor = (tiny_pipe.unet(x_t, b.t_d, c[HIDDEN]).sample for c in (b.c_f, b.c_a))
        close(ours.redirect(b), ((concept - anchor) ** 2).mean())
