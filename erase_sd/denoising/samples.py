"""The model's own pictures as latents: drawn once per prompt and seed, cached by content hash, never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, write_atomic
from erase_sd.common.processes import pictures
from erase_sd.models.families import Cond
from erase_sd.models.pipeline import encode, sample
from erase_sd.settings import Sampling
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
    subject: Tensor | None = None  # (N_f, 2) where the concept ends in c_f and in c_a, see erase_sd.denoising.samples
    marks: Tensor | None = None  # (N_f, L) where the concept stands in c_f, see erase_sd.denoising.samples
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


CONCEPT, END = 1, 2


def marks(tokenizer: Any, captions: list[str], anchors: list[str]) -> Tensor:
    """(N, L) int64: 1 for the concept's tokens, 2 for the first <|endoftext|>, 0 elsewhere.

    The concept's tokens of a caption are those that its anchor's caption does not share at their place: "cat" of "a
    cat in neon style" whose anchor is "a dog in neon style", "a cat" where it is "an object in neon style".
    """
    pairs = zip(_ids(tokenizer, captions), _ids(tokenizer, anchors), strict=True)
    return torch.tensor([_marks(c, a, tokenizer.eos_token_id) for c, a in pairs])


def subjects(tokenizer: Any, captions: list[str], anchors: list[str]) -> Tensor:
    """(N, 2) int64: the last of the concept's tokens in its caption, and its place in the anchor's.

    The places are alike counted from the end: what follows the concept is the same in both. Raises UserError for a
    caption that says no more than its anchor.
    """
    places = []
    for caption, anchor, mark in zip(captions, anchors, marks(tokenizer, captions, anchors).tolist(), strict=True):
        if CONCEPT not in mark:
            raise UserError(f"the caption {caption!r} says no more than its anchor {anchor!r}: give another --anchor")
        last = max(i for i, m in enumerate(mark) if m == CONCEPT)
        end = _ids(tokenizer, [anchor])[0].index(tokenizer.eos_token_id)
        places.append((last, last + end - mark.index(END)))
    return torch.tensor(places)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids as the pipelines of Stable Diffusion make them: all of one length."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids


def _marks(caption: list[int], anchor: list[int], end: int) -> list[int]:
    n = caption.index(end)
    same = SequenceMatcher(None, caption[:n], anchor[: anchor.index(end)], autojunk=False).get_matching_blocks()
    shared = {i for block in same for i in range(block.a, block.a + block.size)}
    return [CONCEPT if i < n and i not in shared else END if i == n else 0 for i in range(len(caption))]
