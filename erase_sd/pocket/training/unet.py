"""The pocket UNet and its text encoder, trained on cached latents with the plain denoising loss.

Retrain is the same network by the same recipe on data without some concepts, with the text encoder as it is.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase_sd.common.files import write_atomic
from erase_sd.common.rng import generator
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit, fit_cycles
from erase_sd.pocket.world import KINDS, Scene, grid, varied

CYCLES, PEAKS, BATCH = (2400, 3000), (1e-3, 8e-4), 32
TEXT_CYCLES = 2  # in which the text encoder learns; later ones go a fifth faster without
RENDERS = 24_000  # pictures encoded once
WIDTH, LENGTH = 96, 77  # of the text encoder's hidden states
LATENT_CHANNELS = 16
GAMMA = 5.0  # min-SNR weight, arXiv 2303.09556
OWN_TOKENS = 0.5  # share of the samples in which the padding tells nothing
HELD_OUT = [("object", "frog"), ("object", "strawberry"), ("style", "pencil"), ("background", "green")]
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDPMScheduler(**NOISE)
Embed = Callable[[list[str]], Tensor]


def build_tokenizer() -> CLIPTokenizer:
    """Build CLIP's tokenizer with a vocabulary of its own: whole words of the pocket captions, bytes for the rest."""
    rng = random.Random(0)
    corpus = [varied(scene, rng) for scene in grid() for _ in range(12)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bpe.pre_tokenizer])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
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
    """Build two layers, 96 wide, 77 tokens."""
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
    """Build 5.5 M parameters in Stable Diffusion v1's block types; the width lies where the map is small."""
    unet = UNet2DConditionModel(
        sample_size=artwork.SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            _silence_(module.conv2)
        elif isinstance(module, Transformer2DModel):
            _silence_(module.proj_out)
    _silence_(unet.conv_out)
    return unet


def _silence_(layer: nn.Conv2d | nn.Linear) -> None:
    """Let a branch start at zero, as in arXiv 2105.05233: the first steps then are not spent on undoing noise."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def encoded(
    trained: Callable[[], AutoencoderKL], known: Tensor, folder: Path, n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Encode n fresh renders to latent means (n, 16, 8, 8), fp16, and labels (n, 3); cached in the folder.

    `trained` gives the VAE, which only an empty cache needs.
    """
    path = folder / f"latents-{n}.safetensors"
    if not path.is_file():
        vae, latents, all_labels = trained(), [], []
        for start in tqdm(range(0, n, 100), desc="latents", unit="00 pictures"):
            x, labels = artwork.scenes(known, min(100, n - start), generator(seed, "latents", start))
            latents.append(vae.encode(x).latent_dist.mean.half())
            all_labels.append(labels)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"z": torch.cat(latents).contiguous(), "labels": torch.cat(all_labels)}, path)
    cache = load_file(path)
    return cache["z"], cache["labels"]


def without(latents: Tensor, labels: Tensor, parts: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Leave out the pictures that show any of the parts; captions are made of labels and cannot name them either."""
    kept = torch.ones(len(labels), dtype=torch.bool)
    for kind, word in parts:
        kept &= labels[:, list(KINDS).index(kind)] != KINDS[kind].index(word)
    return latents[kept], labels[kept]


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, since they learn together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()

    def embed(self, texts: list[str]) -> Tensor:
        """Embed captions to hidden states (B, 77, 96); one that stands there twice is computed once."""
        distinct = list(dict.fromkeys(texts))
        ids = self.tokenizer(distinct, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        hidden = self.text_encoder(ids.to(self.unet.device)).last_hidden_state
        return hidden[[distinct.index(text) for text in texts]]


class Remembered:
    """Embeddings of a text encoder that no longer learns: computed once per caption."""

    def __init__(self, model: Denoiser) -> None:
        self.model, self.known = model, {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Embed captions to hidden states (B, 77, 96)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= dict(zip(new, self.model.embed(new), strict=True))
        return torch.stack([self.known[text] for text in texts])


def hide_padding(hidden: Tensor, empty: Tensor, lengths: Tensor, hidden_rows: Tensor) -> Tensor:
    """Put the empty caption's states (77, 96) after the first end token of the rows (B,) that are marked.

    `lengths` (B,) counts a caption's tokens up to and with its first end token. A concept must then be read from its
    own tokens, where erasers and attacks look for it, not from what attention has carried to the padding alone.
    """
    padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
    replaced = padding & hidden_rows[:, None]
    return torch.where(replaced[..., None], empty, hidden)


def train(
    latents: Tensor,
    labels: Tensor,
    folder: Path,
    *,
    cycles: tuple[int, ...] = CYCLES,
    seed: int = 0,
    text_encoder: CLIPTextModel | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Train on latents (N, 16, 8, 8), one learning-rate cycle after another, each from the averaged weights so far.

    The text encoder learns in the first TEXT_CYCLES; one that is given never does.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(build_tokenizer())
    if text_encoder is not None:
        model.text_encoder = text_encoder
    model.to(device)

    def cycle(i: int, before: int, place: Path) -> None:
        learning = i < TEXT_CYCLES and text_encoder is None
        embed = model.embed if learning else Remembered(model)
        loss = partial(denoising_loss, model, embed, latents, labels, seed, before)
        learner = model if learning else model.unet
        fit(learner, loss, place, steps=cycles[i], lr=PEAKS[min(i, len(PEAKS) - 1)], decay=0.999)

    fit_cycles(cycles, cycle, folder)
    return model.eval().requires_grad_(False).cpu()


def captions_of(labels: Tensor, rng: random.Random) -> list[str]:
    """Write a varied caption for each row of labels (B, 3)."""
    texts = []
    for row in labels.tolist():
        parts = [names[index] for names, index in zip(KINDS.values(), row, strict=True)]
        texts.append(varied(Scene(*parts), rng))
    return texts


def denoising_loss(
    model: Denoiser, embed: Embed, latents: Tensor, labels: Tensor, seed: int, before: int, step: int
) -> Tensor:
    """Weigh the error of the predicted noise by min-SNR on the batch of step `before + step`, captions varied."""
    g = generator(seed, "unet", before + step)
    rows = torch.randint(len(latents), (BATCH,), generator=g)
    texts = captions_of(labels[rows], random.Random(int(torch.randint(2**31, (1,), generator=g))))
    hidden = embed([*texts, ""])
    lengths = torch.tensor([len(ids) for ids in model.tokenizer(texts).input_ids])
    own_only = torch.rand(BATCH, generator=g) < OWN_TOKENS
    device = model.unet.device
    hidden = hide_padding(hidden[:-1], hidden[-1], lengths.to(device), own_only.to(device))
    z = latents[rows].float()
    # One timestep of each thirty-second part of the range: less noise in the gradient than thirty-two free draws.
    part = SCHEDULER.config.num_train_timesteps / BATCH
    t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=g)) * part).long()
    noise = torch.randn(z.shape, generator=g)
    x_t = SCHEDULER.add_noise(z, noise, t).to(device)
    error = (model.unet(x_t, t.to(device), hidden).sample - noise.to(device)).square().mean((1, 2, 3))
    snr = compute_snr(SCHEDULER, t).to(device)
    return (error * snr.clamp(max=GAMMA) / snr).mean()


def assemble(vae: AutoencoderKL, model: Denoiser) -> StableDiffusionPipeline:
    """Put the parts into a genuine StableDiffusionPipeline with a DDIM scheduler and no safety checker."""
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save as fp16 what `from_pretrained(folder)` loads as fp32; the pipeline itself stays as it is.

    transformers takes the type of the configuration where none is asked for, diffusers takes fp32: the configuration
    must not name one, or the two halves of the pipeline could not work together. Nor may it name this machine's paths.
    """
    halves = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            halves[name] = copy.deepcopy(part).half()
    StableDiffusionPipeline(**(pipe.components | halves), requires_safety_checker=False).save_pretrained(str(folder))
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        _tidy(path)
    _prefix_text_model(folder / "text_encoder" / "model.safetensors")


def _prefix_text_model(path: Path) -> None:
    """Name the text encoder's tensors `text_model.*`, as every Stable Diffusion on the Hub does.

    transformers writes them without the prefix since 5.6 and reads both; older versions read only this one.
    """
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Save a UNet alone, as fp16."""
    copy.deepcopy(unet).half().save_pretrained(folder)
    _tidy(folder / "config.json")


def _tidy(path: Path) -> None:
    """Rewrite a configuration without what holds on this machine or for this file alone."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    write_atomic(path, json.dumps(config, indent=2) + "\n")
