"""Runs of the three families that have an LDM layout, as files on disk: a tiny base and an erased UNet."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erase_sd.common.files import digest
from erase_sd.common.rng import generator
from erase_sd.models.families import modules
from erase_sd.models.pipeline import load, sample_batch, save_network
from erase_sd.run.record import weights_hash
from tests.conftest import SD14_UNET, SD14_VAE, TINY_UNET, TINY_VAE, byte_tokenizer, text_encoder

KINDS = ("sd1", "sd2", "sdxl")
XL_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Run(NamedTuple):
    """A finished run and its base, both folders."""

    folder: Path
    base: Path

    def original(self) -> DiffusionPipeline:
        """The base, shared by all tests: not to be changed."""
        return _loaded(self.base, None)

    def erased(self) -> DiffusionPipeline:
        """What this project makes of the run, shared by all tests: not to be changed."""
        return _loaded(self.base, self.folder)


@cache
def _loaded(base: Path, unet: Path | None) -> DiffusionPipeline:
    return load(str(base), unet=unet and str(unet))


@cache
def wanted(run: Run) -> np.ndarray:
    """The picture of a run's network in the base's pipeline."""
    return picture(run.erased())


def export(run: Run, form: str, output: Path, *words: str) -> Path:
    """Carry out the command as a user types it."""
    from erase_sd.export import main

    assert main([str(run.folder), "--to", form, "--output", str(output), *words]) == 0
    return output


def picture(pipe: DiffusionPipeline) -> np.ndarray:
    """Two pictures, (2, H, W, 3), before they are rounded to bytes.

    The weights are moved to memory of their own first: mapped from a file they start anywhere, and kernels sum in
    another order where a tensor is aligned otherwise.
    """
    for part in modules(pipe).values():
        for tensor in part.parameters():
            tensor.data = tensor.data.clone()
    pipe.set_progress_bar_config(disable=True)
    seeds = [generator(seed, "image") for seed in (0, 1)]
    return sample_batch(pipe, ["a cat", "a dog on grass"], seeds, steps=2, guidance=3.5, output_type="np")


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    return weights_hash(ours) == weights_hash(theirs)


def tiny_sd2() -> StableDiffusionPipeline:
    """SD 2 at toy width: linear projections, OpenCLIP's exact GELU, and a network that predicts velocity."""
    tokenizer = byte_tokenizer()
    config = text_encoder(tokenizer).config.to_dict() | {"hidden_act": "gelu"}
    width = {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 4)}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SD14_VAE | TINY_VAE).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config)).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**SD14_UNET | TINY_UNET | width).eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
            prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl() -> StableDiffusionXLPipeline:
    """SD XL at toy width: three levels, text encoders of two widths, which is how readers tell them apart."""
    tokenizer = byte_tokenizer()
    first = text_encoder(tokenizer).eval()
    second = CLIPTextConfig(**first.config.to_dict() | {"hidden_size": 48, "hidden_act": "gelu", "projection_dim": 40})
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SD14_VAE | TINY_VAE).eval(),
        text_encoder=first,
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2, 3),
            projection_class_embeddings_input_dim=6 * 8 + 40,
            cross_attention_dim=80,
        ).eval(),
        scheduler=EulerDiscreteScheduler(**XL_SCHEDULER),
    )


@pytest.fixture(scope="session")
def bases(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the three base models."""
    root = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tiny_sd2().save_pretrained(str(root / "sd2"))
        tiny_xl().save_pretrained(str(root / "sdxl"))
    return {"sd1": tiny_sd, "sd2": root / "sd2", "sdxl": root / "sdxl"}


def edited(unet: nn.Module) -> nn.Module:
    """A copy with dense changes in the cross attention, of rank 2, and with few new entries in every third conv."""
    unet = copy.deepcopy(unet)
    with torch.no_grad():
        for i, (name, weight) in enumerate(unet.named_parameters()):
            rng = generator(0, "edit", name)
            if ".attn2.to_" in name and weight.ndim == 2:
                up, down = torch.randn(len(weight), 2, generator=rng), torch.randn(2, weight.shape[1], generator=rng)
                weight += 0.1 * up @ down
            elif ".conv" in name and weight.ndim == 4 and i % 3 == 0:
                places = torch.randperm(weight.numel(), generator=rng)[: weight.numel() // 100]
                weight.view(-1)[places] += torch.randn(len(places), generator=rng)
    return unet


def write_run(folder: Path, base: Path, network: nn.Module, **config: object) -> Run:
    """The files of a run that an export reads."""
    pipe = load(str(base))
    base_hash = digest([weights_hash(part) for part in modules(pipe).values()])
    values = {"concept": ["cat"], "model": str(base), "model_config": None, "method": "esd", "preset": "sd"} | config
    record = {"config": values, "base": {"model": values["model"], "hash": base_hash}}
    save_network(network, folder, "unet")
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "status.json").write_text(json.dumps({"state": "complete", "code": 0, "message": ""}))
    use = f'```python\npipe.unet = UNet2DConditionModel.from_pretrained("{folder}", subfolder="unet")\n```\n'
    command = f"<pre><code>accelerate launch erase_sd/train.py --output_dir {folder.resolve()}</code></pre>\n"
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n\n# cat erased\n\n{command}\n{use}")
    return Run(folder, base)


@pytest.fixture(scope="session")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each family, not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    return {kind: write_run(root / kind, bases[kind], edited(load(str(bases[kind])).unet)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    """One family after the other."""
    return runs[request.param]


@pytest.fixture
def sd1(runs: dict[str, Run]) -> Run:
    return runs["sd1"]
