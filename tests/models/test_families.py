"""Every family of models through the main job: erase, save, reload, draw."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.denoising import concept
from erase_sd.denoising.samples import Samples, Sources, collect, filled_in
from erase_sd.denoising.task import DenoisingTask
from erase_sd.models.families import FAMILIES, family, network, resolution, sampling_defaults
from erase_sd.models.parameters import GROUPS, select, without_norms
from erase_sd.models.pipeline import encode, load, sample
from erase_sd.settings import Sampling, TaskSettings
from erase_sd.train import main
from prompts import Example

FLOW = ("tiny_sd3", "tiny_flux")
ALL = ("tiny_sd", "tiny_sdxl", *FLOW)
SOURCES = Sources([Example("a cat", "a cat", "a dog")], ["a lake", "a boat"])
QUICK = "--steps 2 --batch_size 2 --sensitivity_batches 1 --resolution 64".split()
QUICK += "--forget_images 2 --retain_images 2 --sample_steps 1".split()


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest) -> Path:
    """A tiny pipeline of each family."""
    return request.getfixturevalue(request.param)


def samples(pipe: DiffusionPipeline, resolution: int = 64) -> Samples:
    knobs = Sampling(forget_images=2, retain_images=2, sample_steps=1, resolution=resolution)
    return collect(pipe, SOURCES, knobs, 0, "model", None)


def task(pipe: DiffusionPipeline) -> DenoisingTask:
    AcceleratorState._reset_state(reset_partial_state=True)
    return DenoisingTask(pipe, samples(pipe), TaskSettings(batch_size=2), 0, Accelerator(cpu=True))


def test_latents_are_images_of_the_vae_at_the_resolution_asked_for(model: Path) -> None:
    pipe = load(str(model))
    native = {"UNet2DConditionModel": 8 * network(pipe).config.get("sample_size", 0), "SD3Transformer2DModel": 64}
    assert resolution(pipe) == native.get(type(network(pipe)).__name__, 1024)
    s = samples(pipe, resolution=128)
    assert s.forget.shape == (2, pipe.vae.config.latent_channels, 16, 16)
    assert s.forget.dtype == torch.float32
    assert "time_ids" not in s.embeddings or s.embeddings["time_ids"][0].tolist() == [128, 128, 0, 0, 128, 128]


DRAWING = {"tiny_sd": (7.5, 20, 30), "tiny_sdxl": (5.0, 25, 30), "tiny_sd3": (7.0, 28, 28), "tiny_flux": (3.5, 28, 28)}


@pytest.mark.parametrize("name", ALL)
def test_guidance_and_steps_are_the_familys_unless_asked_for(name: str, request: pytest.FixtureRequest) -> None:
    pipe = load(str(request.getfixturevalue(name)))
    found = sampling_defaults(family(pipe), network(pipe))
    assert found == DRAWING[name]
    usual = filled_in(pipe, Sampling())
    assert (usual.sample_guidance, usual.sample_steps) == found[:2]
    asked = filled_in(pipe, Sampling(sample_guidance=0.0, sample_steps=3))
    assert (asked.sample_guidance, asked.sample_steps) == (0.0, 3)


def test_flux_is_trained_at_the_guidance_it_is_drawn_with(tiny_flux: Path) -> None:
    pipe = load(str(tiny_flux))
    found = collect(
        pipe, SOURCES, Sampling(forget_images=1, retain_images=1, sample_steps=1, resolution=64), 0, "m", None
    )
    assert set(found.embeddings["guidance"].tolist()) == {3.5}


def test_flux_schnell_has_four_steps_and_no_guidance(tiny_flux: Path) -> None:
    pipe = load(str(tiny_flux))
    pipe.transformer.register_to_config(guidance_embeds=False)
    assert sampling_defaults(family(pipe), pipe.transformer) == (0.0, 4, 4)


def test_the_network_answers_as_in_its_pipeline(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call that the pipeline makes of its network, made again through the task's `predict`."""
    pipe = load(str(model))
    ours, calls = task(pipe), []
    forward = type(network(pipe)).forward

    def spy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append((args, kwargs, out))
        return out

    monkeypatch.setattr(type(network(pipe)), "forward", spy)
    sample(pipe, ["a cat"], [0], steps=1, guidance=3.0, size=64, output_type="latent")
    args, kwargs, out = calls[0]
    out = (out[0] if isinstance(out, tuple) else out.sample)[-1:]  # of guidance's two rows the one with the caption
    x = (args[0] if args else kwargs["hidden_states"])[-1:]
    t = (kwargs.get("timestep") if "timestep" in kwargs else args[1]).float().reshape(-1)[-1:]
    if ours.family.patch > 1:
        x, out, t = ours.family.unpacked(x), ours.family.unpacked(out), 1000 * t
    with torch.no_grad():
        answer = ours.predict(x, t, encode(pipe, ["a cat"], guidance=3.0, size=64))
    torch.testing.assert_close(answer, out.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_the_flow_loss_is_its_formula(name: str, request: pytest.FixtureRequest) -> None:
    ours = task(load(str(request.getfixturevalue(name))))
    b = ours.batch("repair", 0)
    sigma = (b.t_f / 1000)[:, None, None, None]
    x_t = (1 - sigma) * b.z_f + sigma * b.noise_f
    assert ((b.t_f > 0) & (b.t_f <= 1000)).all()
    torch.testing.assert_close(ours.add_noise(b.z_f, b.noise_f, b.t_f), x_t)
    with torch.no_grad():
        by_hand = F.mse_loss(ours.predict(x_t, b.t_f, b.c_f), b.noise_f - b.z_f)
        torch.testing.assert_close(ours.forget(b), by_hand)
        assert ours.preserve(b) == 0


def test_the_shift_of_a_flow_is_the_schedulers(tiny_sd3: Path) -> None:
    pipe = load(str(tiny_sd3))
    plain = task(pipe).process.draw(4000, torch.Generator().manual_seed(0))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    shifted = task(pipe).process.draw(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted / 1000, 3 * (plain / 1000) / (1 + 2 * plain / 1000))
    assert abs(plain.mean() - 500) < 15


def test_the_empty_caption_of_sdxl_is_zeros_as_in_sampling(tiny_sdxl: Path) -> None:
    pipe = load(str(tiny_sdxl))
    cond = encode(pipe, ["", "a cat"])
    assert not cond["encoder_hidden_states"][0].any()
    assert not cond["text_embeds"][0].any()
    assert cond["encoder_hidden_states"][1].any()
    assert cond["time_ids"][0].tolist() == [256, 256, 0, 0, 256, 256]
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode(pipe, [""])["text_embeds"].any()


@pytest.mark.parametrize("name", ["tiny_sdxl", *FLOW, "v-prediction"])
def test_the_main_job(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """From the command line on; what it prints last is run as it stands, and samples."""
    folder = request.getfixturevalue("tiny_sd" if name == "v-prediction" else name)
    if name == "v-prediction":  # Stable Diffusion 2
        pipe = load(str(folder))
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        pipe.save_pretrained(str(folder := tmp_path / "sd2"))

    def quick_sample(*args, **options):
        return sample(*args, **options | {"steps": 1})

    monkeypatch.setattr(concept, "sample", quick_sample)  # of the images before and after
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["--concept", "cat", "--model", str(folder), "--output_dir", str(tmp_path / "run"), *QUICK]) == 0
    part = family(load(str(folder))).part
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    names: dict = {}
    exec(capsys.readouterr().out.split("To use it:")[1], names)
    erased, before = network(names["pipe"]).state_dict(), network(load(str(folder))).state_dict()
    assert any(not torch.equal(erased[key], before[key]) for key in before)
    for pipe in (names["pipe"], load(str(folder), **{part: str(tmp_path / "run")})):
        z: Tensor = sample(pipe, ["a cat"], [0], steps=1, guidance=3.0, size=64, output_type="latent")[0]
        assert z.isfinite().all()


def test_other_families_are_refused(tiny_sd: Path) -> None:
    with pytest.raises(UserError, match=f"a StableDiffusionPipelineNew cannot be erased.*{', '.join(FAMILIES)}"):
        family("StableDiffusionPipelineNew")


FULL = {  # SD3 medium's and Flux dev's own transformers
    "SD3Transformer2DModel": lambda: SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    "FluxTransformer2DModel": lambda: FluxTransformer2DModel(guidance_embeds=True),
}


@pytest.mark.parametrize("kind", FULL)
def test_groups_of_transformers(kind: str) -> None:
    with torch.device("meta"):
        model = FULL[kind]()
    sizes = {group: sum(p.numel() for p in select(model, group).values()) for group in GROUPS[kind]}
    total = {"SD3Transformer2DModel": 2_028_328_000, "FluxTransformer2DModel": 11_901_408_320}[kind]
    assert sizes["full"] == total
    assert sizes["attn"] == sizes["xattn"] + sizes["selfattn"]
    assert sizes["kv"] < sizes["xattn"] < sizes["noxattn"] < sizes["notime"] < sizes["full"]
    kept = without_norms(model, select(model, "full"))
    assert not [name for name in kept if ".norm1" in name or "norm_added" in name]  # scale and shift of adaptive norms
