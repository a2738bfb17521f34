"""The whole main job on a UNet of SD v1.4's size, random weights: what a machine without a GPU needs of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import SD14_SCHEDULER, SD14_UNET, SD14_VAE, TINY_VAE, byte_tokenizer, text_encoder

PARAMETERS = 859_520_964
SMALL = {"batch_size": 1, "sensitivity_batches": 2, "forget_images": 1, "retain_images": 1, "steps": 2}
SMALL |= {"sample_steps": 1, "picture_steps": 1, "checkpointing_steps": 1, "anchor_model": "current"}


@pytest.fixture(scope="module")
def sd14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD v1.4's UNet on latents of 16 x 16, beside a tiny autoencoder and a tiny text encoder of its width."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    width = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**SD14_VAE | TINY_VAE | {"sample_size": 128}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_encoder(tokenizer).config.to_dict() | width)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**SD14_UNET | {"sample_size": 16}),
        scheduler=PNDMScheduler(**SD14_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert sum(p.numel() for p in pipe.unet.parameters()) == PARAMETERS
    folder = tmp_path_factory.mktemp("models") / "sd14"
    pipe.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "limit"), [("sgd", 3.6), ("adamw", 5.6)])
def test_the_main_job_fits(sd14: Path, tmp_path: Path, optimizer: str, limit: float) -> None:
    """Weights, one stored gradient, one gradient: 3 x the parameters; Adam's two moments: 5 x. All in fp32."""
    if psutil.virtual_memory().available < limit * 4 * PARAMETERS:
        pytest.skip(f"needs {limit * 4 * PARAMETERS / 1e9:.0f} GB of free memory")
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "erase_sd/train.py", "--concept", "cat", "--model", str(sd14), "--preset", "paper"]
    command += [*options, "--optimizer", optimizer, "--output_dir", str(tmp_path / "run")]
    job = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-2000:]
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["parameters"] == PARAMETERS
    assert "x the network in fp32" in job.stdout
    assert run["peak_memory_mib"]["host"] * 2**20 <= limit * 4 * PARAMETERS
