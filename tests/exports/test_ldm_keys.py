"""The names and shapes of Stable Diffusion 1, 2 and XL at full size, on the meta device."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erase_sd.exports.ldm import checkpoint
from tests.conftest import SD14_UNET, SD14_VAE, byte_tokenizer
from tests.exports import ldm_table
from tests.exports.conftest import XL_SCHEDULER
from tests.exports.ldm_table import Table, clip_table, open_clip_table, unet_table, vae_table

SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
VIT_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def scheduler(**more: object) -> EulerDiscreteScheduler:
    """A scheduler computes at once, which the meta device cannot."""
    with torch.device("cpu"):
        return EulerDiscreteScheduler(**XL_SCHEDULER, **more)


def sd(unet: dict, encoder: dict) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SD14_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**encoder)),
        tokenizer=byte_tokenizer(),
        unet=UNet2DConditionModel(**SD14_UNET | unet),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(**schedule: object) -> StableDiffusionXLPipeline:
    second = CLIPTextConfig(**VIT_G, hidden_act="gelu", projection_dim=1280)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SD14_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**VIT_L)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        unet=UNet2DConditionModel(**SDXL_UNET),
        scheduler=scheduler(**schedule),
    )


def shapes(pipe: DiffusionPipeline, prefix: str) -> Table:
    found = checkpoint(pipe)
    return {name.removeprefix(prefix): tuple(x.shape) for name, x in found.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionPipeline]:
    with torch.device("meta"):
        return {"sd1": sd({}, VIT_L), "sd2": sd(SD2_UNET, VIT_H | {"hidden_act": "gelu"}), "sdxl": xl()}


@pytest.mark.parametrize(
    ("kind", "shape", "count"),
    [("sd1", ldm_table.SD1, 686), ("sd2", ldm_table.SD2, 686), ("sdxl", ldm_table.SDXL, 1680)],
)
def test_the_unet(models: dict, kind: str, shape: ldm_table.UNetShape, count: int) -> None:
    table = unet_table(shape)
    assert len(table) == count
    assert shapes(models[kind], "model.diffusion_model.") == table


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_vae(models: dict, kind: str) -> None:
    assert len(vae_table()) == 248
    assert shapes(models[kind], "first_stage_model.") == vae_table()


@pytest.mark.parametrize(
    ("kind", "prefix", "table"),
    [
        ("sd1", "cond_stage_model.transformer.", clip_table(768, 12)),
        ("sd2", "cond_stage_model.model.", open_clip_table(1024, 23)),
        ("sdxl", "conditioner.embedders.0.transformer.", clip_table(768, 12)),
        ("sdxl", "conditioner.embedders.1.model.", open_clip_table(1280, 32, projection=1280)),
    ],
)
def test_the_text_encoders(models: dict, kind: str, prefix: str, table: Table) -> None:
    assert shapes(models[kind], prefix) == table


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_nothing_is_left_over(models: dict, kind: str) -> None:
    known = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
    assert all(name.startswith(known) for name in checkpoint(models[kind]))


def test_an_xl_model_says_that_it_predicts_velocity() -> None:
    with torch.device("meta"):
        pipe = xl(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= checkpoint(pipe).keys()
