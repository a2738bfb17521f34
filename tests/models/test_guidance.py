"""Safe Latent Diffusion as a hook, against its three-branch loop written out; and on disk."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from erase_sd.api import erase
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.denoising.card import swap_in_snippet
from erase_sd.methods.sld import SLD
from erase_sd.models.guidance import FILE, SafetyGuidance, Settings, attach, carried, save
from erase_sd.models.guidance import load as stored
from erase_sd.models.pipeline import load, sample

STRONG = Settings(warmup=2, scale=20.0, threshold=0.025, momentum_scale=0.5, momentum=0.7)
SETTINGS = [STRONG, replace(STRONG, warmup=0, scale=5000.0, threshold=1.0), replace(STRONG, momentum_scale=0.0)]
STEPS, GUIDANCE = 6, 7.5


@pytest.fixture
def pipe(tiny_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """In float64: guidance amplifies the last bits, and a threshold makes steps of them."""
    tiny_pipe.to(torch.float64)
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config)
    tiny_pipe.set_progress_bar_config(disable=True)
    return tiny_pipe


def text(pipe: StableDiffusionPipeline, caption: str) -> Tensor:
    return pipe.encode_prompt([caption], "cpu", 1, False)[0]


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=generator(seed, "image"), dtype=torch.float64)


def by_hand(pipe: StableDiffusionPipeline, prompt: str, seed: int, s: Settings) -> Tensor:
    """The paper's sampling loop, one image, each branch a network call of its own."""
    empty, words, concept = (text(pipe, c) for c in ("", prompt, "a cat"))
    pipe.scheduler.set_timesteps(STEPS)
    x = noise(seed)
    nu = torch.zeros_like(x)
    for i, t in enumerate(pipe.scheduler.timesteps):
        e_0, e_p, e_S = (pipe.unet(x, t, c).sample for c in (empty, words, concept))
        d = e_p - e_S
        mu = torch.where(d >= s.threshold, torch.zeros_like(d), torch.minimum(torch.ones_like(d), s.scale * d.abs()))
        gamma = mu * (e_S - e_0) + s.momentum_scale * nu
        nu = s.momentum * nu + (1 - s.momentum) * gamma
        e = e_0 + GUIDANCE * ((e_p - e_0) - (gamma if i >= s.warmup else 0))
        x = pipe.scheduler.step(e, t, x).prev_sample
    return x


def drawn(pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], **more: float) -> Tensor:
    latents = torch.cat([noise(seed) for seed in seeds])
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"} | more
    return pipe(prompt=prompts, latents=latents, **settings).images


@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_the_hook_is_the_three_branch_loop(pipe: StableDiffusionPipeline, settings: Settings) -> None:
    prompts, seeds = ["a cat in the rain", "a dog"], [3, 4]
    wanted = torch.cat([by_hand(pipe, p, s, settings) for p, s in zip(prompts, seeds, strict=True)])
    plain = drawn(pipe, prompts, seeds)
    attach(pipe.unet, SafetyGuidance({"encoder_hidden_states": text(pipe, "a cat")}, settings))
    guided = drawn(pipe, prompts, seeds)
    torch.testing.assert_close(guided, wanted, rtol=0, atol=1e-5)
    assert (guided - plain).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(drawn(pipe, prompts, seeds), guided), "the momentum of one image leaked into the next"


@torch.no_grad()
def test_several_concepts_take_turns(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.cat([text(pipe, "a cat"), text(pipe, "a dog")])
    attach(pipe.unet, SafetyGuidance({"encoder_hidden_states": both}, STRONG))
    asked, forward = [], pipe.unet.forward

    def spied(*args, **kwargs):
        asked.append(kwargs.get("encoder_hidden_states", args[-1] if args else None))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", spied)
    for _ in range(2):  # a second image begins with the first concept again
        asked.clear()
        drawn(pipe, ["a hat"], [0])
        single = [x for x in asked if len(x) == 1]
        assert len(single) == STEPS
        for i, x in enumerate(single):
            assert torch.equal(x, both[i % 2 : i % 2 + 1])


@torch.no_grad()
def test_an_image_is_the_same_in_any_batch(pipe: StableDiffusionPipeline) -> None:
    attach(pipe.unet, SafetyGuidance({"encoder_hidden_states": text(pipe, "a cat")}, STRONG))
    together = drawn(pipe, ["a cat", "a dog", "a hat"], [0, 1, 2])
    alone = torch.cat([drawn(pipe, [p], [i]) for i, p in enumerate(["a cat", "a dog", "a hat"])])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_classifier_free_guidance_nothing_changes(pipe: StableDiffusionPipeline) -> None:
    plain = drawn(pipe, ["a cat", "a dog"], [0, 1], guidance_scale=1.0)
    attach(pipe.unet, SafetyGuidance({"encoder_hidden_states": text(pipe, "a cat")}, STRONG))
    assert torch.equal(drawn(pipe, ["a cat", "a dog"], [0, 1], guidance_scale=1.0), plain)


@torch.no_grad()
def test_momentum_ends_with_an_image_of_one_step(pipe: StableDiffusionPipeline) -> None:
    attach(pipe.unet, SafetyGuidance({"encoder_hidden_states": text(pipe, "a cat")}, replace(STRONG, warmup=0)))
    first = drawn(pipe, ["a cat"], [0], num_inference_steps=1)
    assert torch.equal(drawn(pipe, ["a cat"], [0], num_inference_steps=1), first)


def test_a_network_carries_one_guidance(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    one, two = (SafetyGuidance({"encoder_hidden_states": text(pipe, word)}, STRONG) for word in ("a cat", "a dog"))
    assert carried(pipe.unet) is None
    assert stored(str(tmp_path)) is None
    attach(pipe.unet, one)
    attach(pipe.unet, two)
    assert carried(pipe.unet) is two
    assert len(pipe.unet._forward_hooks) == 1
    save(two, tmp_path)
    again = stored(str(tmp_path))
    assert again.settings == STRONG
    assert again.identity() == two.identity() != one.identity()


SMALL = {"forget_images": 2, "retain_images": 2, "sample_steps": 2, "batch_size": 2, "picture_steps": 2}


def test_a_run_of_sld_loads_like_any_other(tiny_sd: Path, tmp_path: Path) -> None:
    erased, run = load(str(tiny_sd)), tmp_path / "run"
    before = {name: x.clone() for name, x in erased.unet.state_dict().items()}
    record = erase(erased, "cat", "sld", output_dir=run, **SMALL)
    assert all(torch.equal(x, before[name]) for name, x in erased.unet.state_dict().items())
    assert (run / FILE).is_file()
    assert record["trace"]["steps"] == 1
    ask = {"prompts": ["a cat"], "seeds": [5], "steps": 4, "guidance": 7.5, "output_type": "latent"}
    (wanted,), (plain,) = sample(erased, **ask), sample(load(str(tiny_sd)), **ask)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert torch.equal(sample(load(str(tiny_sd), unet=str(run)), **ask)[0], wanted)
    assert torch.equal(sample(load(str(tiny_sd), unet=str(run / "unet")), **ask)[0], wanted)
    resumed = load(str(tiny_sd))
    assert erase(resumed, "cat", "sld", output_dir=run, **SMALL) == record
    assert torch.equal(sample(resumed, **ask)[0], wanted)
    names: dict = {}
    exec(swap_in_snippet(erased, str(tiny_sd), run), names)
    assert carried(names["pipe"].unet) is not None


@pytest.mark.parametrize("knobs", [{"momentum": 1.0}, {"warmup": -1}])
def test_numbers_without_meaning(pipe: StableDiffusionPipeline, knobs: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(knobs))}"):
        erase(pipe, "cat", "sld", **knobs)


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd3"])
def test_other_families_are_guided_too(model: str, request: pytest.FixtureRequest) -> None:
    pipe = load(str(request.getfixturevalue(model)))
    ask = {"prompts": ["a cat", "a dog"], "seeds": [5, 6], "steps": 3, "guidance": 7.5, "output_type": "latent"}
    plain = sample(pipe, **ask)
    erase(pipe, "cat", "sld", **SMALL)
    guided = sample(pipe, **ask)
    assert all((x - y).abs().max() > 1e-4 and x.isfinite().all() for x, y in zip(guided, plain, strict=True))


def test_flux_has_nothing_to_guide() -> None:
    flux = SimpleNamespace(config={"guidance_embeds": False})
    with pytest.raises(UserError, match="Flux"):
        SLD().check_network(flux, ())
