"""Sampling depends on seeds alone, and what is saved loads everywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from erase_sd.models.noise import forward_process
from erase_sd.models.pipeline import encode, load, sample, save_network

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_batch_size_and_order_change_nothing(tiny_pipe, scheduler: type | None) -> None:
    if scheduler:
        tiny_pipe.scheduler = scheduler.from_config(tiny_pipe.scheduler.config, clip_sample=False)
    prompts, seeds = ["a cat", "a dog", "a red bird", "snail"], [3, 1, 4, 1]
    draw = {"steps": 4, "guidance": 5.0}
    together = sample(tiny_pipe, prompts, seeds, batch_size=4, **draw)
    alone = sample(tiny_pipe, prompts, seeds, batch_size=1, **draw)
    backwards = sample(tiny_pipe, prompts[::-1], seeds[::-1], batch_size=3, **draw)[::-1]
    for one, two, three in zip(together, alone, backwards, strict=True):
        assert levels_apart(one, two) <= 1
        assert levels_apart(one, three) <= 1
    assert levels_apart(together[0], together[1]) > 1


def levels_apart(one, two) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max())


def test_sampling_leaves_the_pipeline_and_the_global_random_state_alone(tiny_pipe) -> None:
    scheduler, before, state = tiny_pipe.scheduler, str(vars(tiny_pipe.scheduler)), torch.get_rng_state()
    sample(tiny_pipe, ["a cat"], [0], steps=3, guidance=7.5)
    assert tiny_pipe.scheduler is scheduler
    assert str(vars(scheduler)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_latents(tiny_pipe) -> None:
    latents = sample(tiny_pipe, ["a cat"] * 3, [0, 1, 0], steps=2, guidance=1.0, batch_size=2, output_type="latent")
    assert [latent.shape for latent in latents] == [(4, 8, 8)] * 3
    assert latents[0].dtype == torch.float32
    assert torch.allclose(latents[0], latents[2], atol=1e-5)
    assert not torch.allclose(latents[0], latents[1])


def test_size_in_pixels(tiny_pipe) -> None:
    assert sample(tiny_pipe, ["a cat"], [0], steps=1, guidance=1.0, size=32)[0].size == (32, 32)


def test_encode_is_what_the_pipeline_uses(tiny_pipe) -> None:
    hidden = encode(tiny_pipe, ["a cat", "", "x" * 500], batch_size=2)["encoder_hidden_states"]
    assert hidden.shape == (3, 77, 32)
    assert hidden.dtype == torch.float32
    assert not hidden.requires_grad
    tokens = tiny_pipe.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(hidden[:1], tiny_pipe.text_encoder(tokens).last_hidden_state, atol=1e-6)


def test_noising_keeps_the_forward_process(tiny_pipe) -> None:
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type="v_prediction")
    scheduler = forward_process(tiny_pipe).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, tiny_pipe.scheduler.alphas_cumprod)


def test_round_trip_and_swap(tiny_sd: Path, tiny_pipe, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_pipe.unet.conv_out.bias += 1
    file = save_network(tiny_pipe.unet, tmp_path / "run", "unet")
    assert file == tmp_path / "run" / "unet"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["unet"]
    assert str(tiny_sd) not in (file / "config.json").read_text()
    for source in (tmp_path / "run", file):
        swapped = load(str(tiny_sd), unet=str(source)).unet.state_dict()
        assert all(torch.equal(swapped[name], tensor) for name, tensor in tiny_pipe.unet.state_dict().items())


def test_saving_in_half_precision_leaves_the_model_alone(tiny_pipe, tmp_path: Path) -> None:
    save_network(tiny_pipe.unet, tmp_path, "unet", torch.float16)
    weights = load_file(tmp_path / UNET_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert tiny_pipe.unet.dtype == torch.float32
    assert not tiny_pipe.unet.conv_in.weight.is_meta


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e6, torch.float16)])
def test_weights_that_are_not_finite_are_never_saved(tiny_pipe, tmp_path: Path, value: float, dtype) -> None:
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="conv_in.weight"):
        save_network(tiny_pipe.unet, tmp_path, "unet", dtype)
    assert not list(tmp_path.iterdir())


def test_other_pipelines_accept_the_saved_unet(tiny_sd: Path, tiny_pipe, tmp_path: Path) -> None:
    save_network(tiny_pipe.unet, tmp_path, "unet")
    unet = UNet2DConditionModel.from_pretrained(str(tmp_path), subfolder="unet", dtype=torch.float32)
    drawing = AutoPipelineForText2Image.from_pretrained(str(tiny_sd), unet=unet)
    picture = drawing("a cat", num_inference_steps=2).images[0]
    redrawing = StableDiffusionImg2ImgPipeline.from_pretrained(str(tiny_sd), unet=unet)
    assert redrawing("a dog", image=picture, strength=0.5, num_inference_steps=4).images[0].size == picture.size
