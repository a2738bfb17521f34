"""Stable Diffusion v1.4's parts from their configuration, at any width, with random weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from erase_sd.common.processes import accelerator
from erase_sd.common.rng import generator
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingTask
from erase_sd.pocket import FOLDER
from erase_sd.settings import TaskSettings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Widths = tuple[int, ...]
TOKENS, PIXELS = 77, 8  # of a caption; along a side, for each latent


def text_width(widths: Widths) -> int:
    """Return the text encoder's width, in SD v1.4's proportion to the UNet's: 768 beside 320, and 12 heads."""
    return 12 * max(1, round(64 * widths[0] / 320))


def unet(widths: Widths, side: int) -> UNet2DConditionModel:
    """Return SD v1.4's UNet, diffusers' default but for the width of the text; `side` is that of its latents."""
    from diffusers import UNet2DConditionModel

    groups = math.gcd(32, *(width // 2 for width in widths))  # 32; narrow ones still get two channels to a group
    return UNet2DConditionModel(
        sample_size=side, block_out_channels=widths, norm_num_groups=groups, cross_attention_dim=text_width(widths)
    )


def vae(widths: Widths) -> AutoencoderKL:
    """Return SD v1.4's encoder and decoder in proportion to the UNet: (128, 256, 512, 512) beside 320."""
    from diffusers import AutoencoderKL

    channels = tuple(8 * max(1, round(width * widths[0] / 320 / 8)) for width in (128, 256, 512, 512))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=math.gcd(32, *channels),
        sample_size=512,
    )


def text_encoder(widths: Widths, layers: int, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return CLIP ViT-L/14's text model at the width that fits the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width = text_width(widths)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenizer() -> CLIPTokenizer:
    """Return the pocket model's tokenizer: what the words are makes no difference here."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(FOLDER / "tokenizer"))


def pipeline(widths: Widths, side: int, layers: int = 12) -> StableDiffusionPipeline:
    """Return the whole model from a fixed seed; the global random state is left as it was."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            unet=unet(widths, side).eval(),
            vae=vae(widths).eval(),
            text_encoder=text_encoder(widths, layers, words).eval(),
            tokenizer=words,
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def samples(n: int, side: int, width: int) -> Samples:
    """Return n random latents of each set, (n, 4, side, side), each with a caption of its own."""
    draw = generator(0, "speed", n, side)
    return Samples(
        forget=torch.randn(n, 4, side, side, generator=draw),
        retain=torch.randn(n, 4, side, side, generator=draw),
        caption=torch.arange(n),
        anchor=torch.arange(n, 2 * n),
        keep=torch.arange(2 * n, 3 * n),
        embeddings={"encoder_hidden_states": torch.randn(3 * n + 1, TOKENS, width, generator=draw)},
        empty=3 * n,
    )


def losses(n: int) -> TaskSettings:
    """Return settings of n samples of each set per step; everything is trained, no second network is kept."""
    return TaskSettings(batch_size=n, anchor_model="current", trim_scope="full", train_scope="full", drop_captions=0.0)


def task(pipe: StableDiffusionPipeline, n: int, side: int, precision: str | None = None) -> DenoisingTask:
    """Return what the main job repairs, n samples of each set per step."""
    made = samples(n, side, pipe.unet.config.cross_attention_dim)
    return DenoisingTask(pipe, made, losses(n), 0, accelerator(precision))
