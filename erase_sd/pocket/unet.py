"""The pocket text encoder, tokenizer and UNet, trained together on cached latents with the plain denoising loss."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase_sd.pocket import artwork
from erase_sd.pocket.captions import BACKGROUNDS, OBJECTS, STYLES, Scene, grid, varied
from erase_sd.pocket.fit import fit
from erase_sd.runtime import generator

STEPS, BATCH, LR = 4500, 64, 1e-3
RENDERS = 48_000  # pictures encoded once
GAMMA = 5.0  # min-SNR weight, arXiv 2303.09556
WIDTH, LENGTH = 96, 77
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: whole words of the pocket captions, bytes for everything else."""
    rng = random.Random(0)
    corpus = [varied(scene, rng) for scene in grid() for _ in range(8)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bpe.pre_tokenizer])
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    vocab = bpe.get_vocab()
    for character in sorted(alphabet):
        vocab.setdefault(f"{character}</w>", len(vocab))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 96 wide, 77 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """4.5 M parameters in Stable Diffusion v1's block types."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 120),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@torch.no_grad()
def encoded(vae: AutoencoderKL, known: Tensor, folder: Path, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latent means (n, 8, 8, 8) and labels (n, 3) of fresh renders, cached in the folder."""
    path = folder / f"latents-{n}.safetensors"
    if not path.is_file():
        parts = []
        for i in range(0, n, 500):
            x, labels = artwork.scenes(known, 500, generator(seed, "latents", i))
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encode(x).latent_dist.mean
            parts.append((z.half().contiguous(), labels))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"z": torch.cat([z for z, _ in parts]), "labels": torch.cat([y for _, y in parts])}, path)
    cache = load_file(path)
    return cache["z"], cache["labels"]


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, since they learn together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise for latents (B, 8, 8, 8), timesteps (B,) and token ids (B, 77)."""
        return self.unet(x, t, self.text_encoder(ids).last_hidden_state).sample


def train(vae: AutoencoderKL, known: Tensor, folder: Path, *, steps: int = STEPS, seed: int = 0) -> Denoiser:
    """Train on cached latents; returns the averaged weights."""
    tokenizer, scheduler = build_tokenizer(), DDPMScheduler(**NOISE)
    latents, labels = encoded(vae, known, folder, RENDERS, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(tokenizer)

    def loss(step: int) -> Tensor:
        g = generator(seed, "unet", step)
        rows = torch.randint(len(latents), (BATCH,), generator=g)
        rng = random.Random(int(torch.randint(2**31, (1,), generator=g)))
        scenes = [Scene(OBJECTS[o], STYLES[s], BACKGROUNDS[b]) for o, s, b in labels[rows].tolist()]
        ids = tokenizer(
            [varied(scene, rng) for scene in scenes], padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).input_ids
        z, t = latents[rows].float(), torch.randint(1000, (BATCH,), generator=g)
        noise = torch.randn(z.shape, generator=g)
        error = (model(scheduler.add_noise(z, noise, t), t, ids) - noise).square().mean((1, 2, 3))
        snr = compute_snr(scheduler, t)
        return (error * snr.clamp(max=GAMMA) / snr).mean()

    fit(model, loss, folder, steps=steps, lr=LR, decay=0.999)
    return model.eval().requires_grad_(False)


def assemble(vae: AutoencoderKL, model: Denoiser) -> StableDiffusionPipeline:
    """The parts as a genuine StableDiffusionPipeline with a DDIM scheduler and no safety checker."""
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save as fp16, the trained pipeline itself stays fp32."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    halves = {name: copy.deepcopy(part).half() for name, part in parts.items()}
    StableDiffusionPipeline(**(pipe.components | halves), requires_safety_checker=False).save_pretrained(str(folder))
