"""The model's own pictures as latents: drawn once per prompt and seed, cached by content hash, never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save
from torch import Tensor

from erase_sd.families import Cond
from erase_sd.knobs import Sampling
from erase_sd.pipeline import encode, sample
from erase_sd.runtime import digest, write_atomic
from erase_sd.sharing import pictures
from erase_sd.tokens import marks, subjects
from prompts import Example

CHUNK = 64  # pictures per cache file: what a killed run loses at most


class Sources(NamedTuple):
    """What to draw: the concept with its anchors, and prompts of everything else."""

    forget: list[Example]
    retain: list[str]
    concept: str = ""  # the concept in its own words, all of them if there are several


class Samples(NamedTuple):
    """Latents (N, C, H, W) in fp32 and, for each, a row of the table of captions; or many captions and one latent."""

    forget: Tensor
    retain: Tensor
    caption: Tensor  # (N_f,) row of c_f
    anchor: Tensor  # (N_f,) row of c_a
    keep: Tensor  # (N_r,) row of c_r
    embeddings: Cond  # conditioning of all U captions: tensors (U, ...)
    empty: int  # row of the empty caption
    anchors: Tensor | None = None  # (N_f, C, H, W) what the anchor of each forget sample draws
    subject: Tensor | None = None  # (N_f, 2) where the concept ends in c_f and in c_a, see erase_sd.tokens
    marks: Tensor | None = None  # (N_f, L) where the concept stands in c_f, see erase_sd.tokens
    concept: int = 0  # row of the concept's own words

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token embeddings of each different (c_f, c_a) from the concept's last token on: (l, D) both.

        They end together at the shorter one's end, so that the same padding meets the same padding.
        """
        text = self.embeddings["encoder_hidden_states"]
        rows = torch.cat([self.caption[:, None], self.anchor[:, None], self.subject], dim=1).unique(dim=0)
        for c, a, i, j in rows.tolist():
            length = text.shape[1] - max(i, j)
            yield text[c, i : i + length], text[a, j : j + length]

    def kept(self) -> Iterator[Tensor]:
        """Token embeddings (L, D) of each different retain caption, and of the empty one."""
        for row in sorted({self.empty, *self.keep.tolist()}):
            yield self.embeddings["encoder_hidden_states"][row]


def seeds(seed: int, purpose: int, n: int) -> list[int]:
    """Image seeds of a run's own drawings; those below one million are left to evaluation."""
    return [(2 * seed + purpose + 1) * 1_000_000 + i for i in range(n)]


def collect(
    pipe: DiffusionPipeline,
    sources: Sources,
    knobs: Sampling,
    seed: int,
    model_hash: str,
    cache: Path | None,
    words_only: bool = False,
) -> Samples:
    """Draw forget and retain latents and encode their captions; the cache makes both resumable and shared.

    With `words_only` one picture of each set is drawn, which is enough to see that the network still computes, and
    all captions are encoded.
    """
    forget = [sources.forget[i % len(sources.forget)] for i in range(knobs.forget_images)]
    retain = [sources.retain[i % len(sources.retain)] for i in range(knobs.retain_images)]

    def latents(prompts: list[str], purpose: int, description: str) -> Tensor:
        prompts = prompts[:1] if words_only else prompts
        return drawn(pipe, prompts, seeds(seed, purpose, len(prompts)), knobs, model_hash, cache, description)

    z_f = latents([e.prompt for e in forget], 0, "forget set")
    z_r = latents(retain, 1, "retain set")
    z_a = latents([e.anchor for e in forget], 0, "anchor set") if knobs.anchor_pictures else None
    captions, replacements = [e.caption for e in forget], [e.anchor for e in forget]
    texts = list(dict.fromkeys(["", sources.concept, *retain, *captions, *replacements]))
    row = {text: i for i, text in enumerate(texts)}
    return Samples(
        forget=z_f,
        retain=z_r,
        caption=torch.tensor([row[e.caption] for e in forget]),
        anchor=torch.tensor([row[e.anchor] for e in forget]),
        keep=torch.tensor([row[text] for text in retain]),
        embeddings=encode(pipe, texts, knobs.sample_guidance, knobs.resolution),
        empty=row[""],
        anchors=z_a,
        subject=subjects(pipe.tokenizer, captions, replacements),
        marks=marks(pipe.tokenizer, captions, replacements),
        concept=row[sources.concept],
    )


def drawn(
    pipe: DiffusionPipeline,
    prompts: list[str],
    image_seeds: list[int],
    knobs: Sampling,
    model_hash: str,
    cache: Path | None,
    description: str,
) -> Tensor:
    """Latents (N, C, H, W) of the prompts, chunk by chunk, from the cache where it has them; processes share them."""
    work = lambda texts, places: _chunk(pipe, texts, places, knobs, model_hash, cache)  # noqa: E731
    return torch.cat(pictures(prompts, image_seeds, CHUNK, work, description))


def _chunk(
    pipe: DiffusionPipeline,
    prompts: list[str],
    image_seeds: list[int],
    knobs: Sampling,
    model_hash: str,
    cache: Path | None,
) -> Tensor:
    """One chunk of latents; the file's name is the hash of everything they depend on."""
    recipe = [model_hash, prompts, image_seeds, knobs.sample_steps, knobs.sample_guidance, dict(pipe.scheduler.config)]
    recipe += [knobs.resolution] if knobs.resolution else []
    path = cache and cache / f"latents-{digest(recipe)[:32]}.safetensors"
    if path and path.is_file():
        return load_file(path)["z"]
    z = torch.stack(
        sample(
            pipe,
            prompts,
            image_seeds,
            steps=knobs.sample_steps,
            guidance=knobs.sample_guidance,
            batch_size=knobs.sample_batch_size,
            size=knobs.resolution,
            output_type="latent",
        )
    )
    if path:
        write_atomic(path, save({"z": z}))
    return z
