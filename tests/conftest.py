"""Shared fixtures: Stable Diffusion v1.4's own configuration at reduced width, saved to disk.

The tiny model keeps what the code under test depends on (block types, depth, parameter names, scheduler, tokenizer
length) and shrinks only widths and vocabulary, so it is built in about a second and never needs the network.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: a test that reached the Hub would not be a test

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from erase_sd.core.task import REPLICATED, MicroBatch

SD14_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD14_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD14_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TINY_UNET = {"sample_size": 8, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "cross_attention_dim": 32}
TINY_VAE = {"sample_size": 64, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}


class Alone:
    """What every task of a single process without micro-batches has in common; the rest is the test's."""

    model: nn.Module
    shards = REPLICATED

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def micro_batches(self, batch: object) -> list[MicroBatch]:
        return [MicroBatch(batch)]

    def smaller(self) -> bool:
        return False

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, x: Tensor) -> Tensor:
        return x


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token, alone or ending a word, so that any text tokenises."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_pipeline() -> StableDiffusionPipeline:
    """Random weights from a fixed seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        return StableDiffusionPipeline(
            vae=AutoencoderKL(**SD14_VAE | TINY_VAE).eval(),
            text_encoder=text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**SD14_UNET | TINY_UNET).eval(),
            scheduler=PNDMScheduler(**SD14_SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny pipeline, shared by the whole session: copy it before changing it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_pipeline().save_pretrained(str(folder))
    return folder


@pytest.fixture
def tiny_pipe(tiny_sd: Path) -> StableDiffusionPipeline:
    """The tiny pipeline, loaded afresh for one test, which may change it."""
    from erase_sd.models.pipeline import load

    return load(str(tiny_sd))


@pytest.fixture(scope="session")
def sd14_unet() -> UNet2DConditionModel:
    """SD v1.4's UNet at full size on the meta device: names and shapes without the 3.4 GB."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD14_UNET)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL pipeline, two text encoders and all, at toy width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, encoder = byte_tokenizer(), text_encoder(byte_tokenizer())
        config = CLIPTextConfig(**encoder.config.to_dict() | {"projection_dim": 32})
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**SD14_VAE | TINY_VAE).eval(),
            text_encoder=encoder.eval(),
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=32,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8,
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=6 * 8 + 32,
                cross_attention_dim=64,
            ).eval(),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    pipe.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 pipeline, a flow transformer, at toy width and without its T5 encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        config = CLIPTextConfig(**text_encoder(tokenizer).config.to_dict() | {"projection_dim": 32})
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=1,
                in_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                out_channels=4,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(**SD14_VAE | TINY_VAE, shift_factor=0.06).eval(),
            text_encoder=CLIPTextModelWithProjection(config).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    pipe.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline, dev's guidance input and all, at toy width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, letters = byte_tokenizer(), sorted(ByteLevel.alphabet())
        t5 = T5Tokenizer(
            vocab=[(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "\u2581", *letters)],
            extra_ids=0,
            model_max_length=32,
        )
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(**SD14_VAE | TINY_VAE, shift_factor=0.06).eval(),
            text_encoder=text_encoder(clip).eval(),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
            ).eval(),
            tokenizer_2=t5,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipe.save_pretrained(str(folder))
    return folder
