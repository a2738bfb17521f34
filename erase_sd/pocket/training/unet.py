"""The pocket UNet, trained on cached latents with the plain denoising loss; the text encoder learns with it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase_sd.common.rng import generator
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit
from erase_sd.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Scene, grid, varied

CYCLES, PEAKS, BATCH = (4500, 4500, 1400), (1e-3, 8e-4, 5e-4), 64
RENDERS = 48_000  # pictures encoded once
GAMMA = 5.0  # min-SNR weight, arXiv 2303.09556
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDPMScheduler(**NOISE)


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
        self.tokenizer = tokenizer
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings (B, 77, 96) of captions."""
        ids = self.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state


class Remembered:
    """Embeddings of a text encoder that no longer learns: computed once per caption."""

    def __init__(self, model: Denoiser) -> None:
        self.model, self.known = model, {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Embeddings (B, 77, 96) of captions."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= dict(zip(new, self.model.embed(new), strict=True))
        return torch.stack([self.known[text] for text in texts])


def train(
    vae: AutoencoderKL, known: Tensor, folder: Path, *, cycles: tuple[int, ...] = CYCLES, seed: int = 0
) -> Denoiser:
    """Train on cached latents, one learning-rate cycle after another, each from the last one's averaged weights.

    The text encoder learns in the first cycle only, which makes the others a third faster.
    """
    latents, labels = encoded(vae, known, folder, RENDERS, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(build_tokenizer())
    model.unet.to(memory_format=torch.channels_last)
    for i, steps in enumerate(cycles):
        embed = model.embed if i == 0 else Remembered(model)
        loss = partial(denoising_loss, model.unet, embed, latents, labels, seed, sum(cycles[:i]))
        learner = model if i == 0 else model.unet
        fit(learner, loss, folder / f"cycle-{i + 1}", steps=steps, lr=PEAKS[min(i, len(PEAKS) - 1)], decay=0.999)
    return model.eval().requires_grad_(False)


def denoising_loss(
    unet: UNet2DConditionModel,
    embed: Callable[[list[str]], Tensor],
    latents: Tensor,
    labels: Tensor,
    seed: int,
    before: int,
    step: int,
) -> Tensor:
    """Min-SNR weighted error of the predicted noise on the batch of step `before + step`, captions varied."""
    g = generator(seed, "unet", before + step)
    rows = torch.randint(len(latents), (BATCH,), generator=g)
    rng = random.Random(int(torch.randint(2**31, (1,), generator=g)))
    texts = [varied(Scene(OBJECTS[o], STYLES[s], BACKGROUNDS[b]), rng) for o, s, b in labels[rows].tolist()]
    z, t = latents[rows].float(), torch.randint(1000, (BATCH,), generator=g)
    noise = torch.randn(z.shape, generator=g)
    x_t = SCHEDULER.add_noise(z, noise, t).to(memory_format=torch.channels_last)
    error = (unet(x_t, t, embed(texts)).sample - noise).square().mean((1, 2, 3))
    snr = compute_snr(SCHEDULER, t)
    return (error * snr.clamp(max=GAMMA) / snr).mean()


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


WIDTH, LENGTH = 96, 77


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
    ends = sorted(token for token in vocab if len(token) == len("x</w>") and token.endswith("</w>"))
    vocab |= dict(zip(ends, sorted(vocab[token] for token in ends), strict=True))  # the trainer numbers them by chance
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
