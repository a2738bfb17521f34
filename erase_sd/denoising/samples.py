"""What a model learns from, as latents: its own images, sampled once per prompt and seed, or pictures of the user.

Both are cached by the hash of their content; nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, write_atomic
from erase_sd.common.processes import sample_shared
from erase_sd.denoising.own_data import opened
from erase_sd.models.families import Cond, family, network, sampling_defaults
from erase_sd.models.pipeline import encode, encode_pictures, sample
from erase_sd.settings import Sampling
from prompts import Example

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

CHUNK = 64  # images per cache file: what a killed run loses at most
CONCEPT, END = 1, 2  # in `marks`: a token of the concept, the first <|endoftext|>


class Sources(NamedTuple):
    """What to sample: the concepts with their anchors, and prompts of everything else."""

    forget: list[Example]
    retain: list[str]
    concepts: tuple[str, ...] = ("",)  # each concept in its own words
    owners: tuple[int, ...] = ()  # which of the concepts each of `forget` asks for; () is the first
    forget_pictures: tuple[Path, ...] = ()  # the user's own, one for each of `forget`: nothing is sampled then
    retain_pictures: tuple[Path, ...] = ()  # the same for `retain`

    def owner(self, i: int) -> str:
        """Return the concept, in its own words, that the i-th of `forget` asks for."""
        return self.concepts[self.owners[i] if self.owners else 0]

    def identity(self) -> str:
        """Return a hash of all pictures and texts, which tells one run's own data from another's."""
        pictures = [*map(file_digest, self.forget_pictures), *map(file_digest, self.retain_pictures)]
        return digest([pictures, self.forget, self.retain])


class Samples(NamedTuple):
    """Latents (N, C, H, W) in fp32 and, for each, a row of the table of captions; or many captions and one latent."""

    forget: Tensor
    retain: Tensor
    caption: Tensor  # (N_f,) row of c_f
    anchor: Tensor  # (N_f,) row of c_a
    keep: Tensor  # (N_r,) row of c_r
    embeddings: Cond  # conditioning of all U captions: tensors (U, ...)
    empty: int  # row of the empty caption
    anchors: Tensor | None = None  # (N_f, C, H, W) an image of the anchor of each forget sample
    subject: Tensor | None = None  # (N_f, 2) where the concept ends in c_f and in c_a, see `subjects`
    marks: Tensor | None = None  # (N_f, L) where the concept stands in c_f, see `marks`
    concepts: tuple[int, ...] = (0,)  # rows of the concepts' own words
    words: Tensor | None = None  # (N_f,) the one of these rows that is c_f's; None is the first

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token embeddings of each different (c_f, c_a) from the concept's last token on: (l, D) both.

        They end together at the shorter one's end, so that the same padding meets the same padding.
        """
        text = self.embeddings["encoder_hidden_states"]
        rows = torch.cat([self.caption[:, None], self.anchor[:, None], self.subject], dim=1).unique(dim=0)
        for c, a, i, j in rows.tolist():
            length = text.shape[1] - max(i, j)
            yield text[c, i : i + length], text[a, j : j + length]

    def kept(self) -> Iterator[Tensor]:
        """Yield token embeddings (L, D) of each different retain caption, and of the empty one."""
        for row in sorted({self.empty, *self.keep.tolist()}):
            yield self.embeddings["encoder_hidden_states"][row]


def seeds(seed: int, purpose: int, n: int) -> list[int]:
    """Return n image seeds of a run's own samples; those below one million are left to evaluation."""
    first = (2 * seed + purpose + 1) * 1_000_000
    return list(range(first, first + n))


def collect(
    pipe: DiffusionPipeline,
    sources: Sources,
    settings: Sampling,
    seed: int,
    model_hash: str,
    cache: Path | None,
    words_only: bool = False,
) -> Samples:
    """Sample forget and retain latents and encode their captions; the cache makes both resumable and shared.

    The user's own pictures, where there are any, take the place of sampled ones, and there are as many as these. With
    `words_only` one image of each set is sampled, which is enough to see that the network still computes, and all
    captions are encoded.
    """
    settings = filled_in(pipe, settings)

    def latents(prompts: list[str], pictures: tuple[Path, ...], purpose: int, description: str) -> Tensor:
        n = 1 if words_only else len(prompts)
        if pictures:
            return _own(pipe, pictures[:n], settings, model_hash, cache, description)
        return sampled(pipe, prompts[:n], seeds(seed, purpose, n), settings, model_hash, cache, description)

    prompts, captions, anchors, words = [], [], [], []
    for i in range(len(sources.forget_pictures) or settings.forget_images):
        i %= len(sources.forget)
        example = sources.forget[i]
        prompts.append(example.prompt)
        captions.append(example.caption)
        anchors.append(example.anchor)
        words.append(sources.owner(i))
    retain = []
    for i in range(len(sources.retain_pictures) or settings.retain_images):
        retain.append(sources.retain[i % len(sources.retain)])
    z_f = latents(prompts, sources.forget_pictures, 0, "forget set")
    z_r = latents(retain, sources.retain_pictures, 1, "retain set")
    z_a = latents(anchors, (), 0, "anchor set") if settings.anchor_pictures else None
    texts = list(dict.fromkeys(["", *sources.concepts, *retain, *captions, *anchors]))
    row = {text: i for i, text in enumerate(texts)}
    return Samples(
        forget=z_f,
        retain=z_r,
        caption=torch.tensor([row[text] for text in captions]),
        anchor=torch.tensor([row[text] for text in anchors]),
        keep=torch.tensor([row[text] for text in retain]),
        embeddings=encode(pipe, texts, settings.sample_guidance, settings.resolution),
        empty=row[""],
        anchors=z_a,
        subject=subjects(pipe.tokenizer, captions, anchors),
        marks=marks(pipe.tokenizer, captions, anchors),
        concepts=tuple(row[text] for text in sources.concepts),
        words=torch.tensor([row[text] for text in words]),
    )


def filled_in(pipe: DiffusionPipeline, settings: Sampling) -> Sampling:
    """Return the settings with the guidance and steps of the pipeline's family where none were asked for."""
    usual = sampling_defaults(family(pipe), network(pipe))
    guidance = usual.guidance if settings.sample_guidance is None else settings.sample_guidance
    return replace(settings, sample_guidance=guidance, sample_steps=settings.sample_steps or usual.steps)


def _own(
    pipe: DiffusionPipeline,
    pictures: tuple[Path, ...],
    settings: Sampling,
    model_hash: str,
    cache: Path | None,
    description: str,
) -> Tensor:
    """Return latents (N, C, H, W) of the user's pictures, chunk by chunk, from the cache where it has them."""

    def encode_chunk(names: list[str], _: list[int]) -> Tensor:
        recipe = ["own pictures", model_hash, list(map(file_digest, names)), settings.resolution]

        def make() -> list[Tensor]:
            images = [opened(Path(name)) for name in names]
            return encode_pictures(pipe, images, settings.resolution)

        return _cached(recipe, cache, make)

    return torch.cat(sample_shared(list(map(str, pictures)), [0] * len(pictures), CHUNK, encode_chunk, description))


def sampled(
    pipe: DiffusionPipeline,
    prompts: list[str],
    image_seeds: list[int],
    settings: Sampling,
    model_hash: str,
    cache: Path | None,
    description: str,
) -> Tensor:
    """Return latents (N, C, H, W) of the prompts, chunk by chunk, from the cache where it has them.

    The processes share the chunks among them.
    """

    def sample_chunk(texts: list[str], chunk_seeds: list[int]) -> Tensor:
        return _chunk(pipe, texts, chunk_seeds, settings, model_hash, cache)

    return torch.cat(sample_shared(prompts, image_seeds, CHUNK, sample_chunk, description))


def _chunk(
    pipe: DiffusionPipeline,
    prompts: list[str],
    image_seeds: list[int],
    settings: Sampling,
    model_hash: str,
    cache: Path | None,
) -> Tensor:
    """Return one chunk of latents; the name of its file is the hash of everything they depend on."""
    recipe = [
        model_hash,
        prompts,
        image_seeds,
        settings.sample_steps,
        settings.sample_guidance,
        scheduler_settings(pipe.scheduler),
    ]
    if settings.resolution:
        recipe.append(settings.resolution)

    def make() -> list[Tensor]:
        return sample(
            pipe,
            prompts,
            image_seeds,
            steps=settings.sample_steps,
            guidance=settings.sample_guidance,
            batch_size=settings.sample_batch_size,
            size=settings.resolution,
            output_type="latent",
        )

    return _cached(recipe, cache, make)


def _cached(recipe: list[Any], cache: Path | None, make: Callable[[], list[Tensor]]) -> Tensor:
    """Return the latents (N, C, H, W) that a recipe describes: from its file in the cache, else made and stored."""
    path = cache and cache / f"latents-{digest(recipe)[:32]}.safetensors"
    if path and path.is_file():
        return load_file(path)["z"]
    z = torch.stack(make())
    if path:
        write_atomic(path, save({"z": z}))
    return z


def scheduler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return what a scheduler computes from: its class and its settings, whether they were given or left out.

    The private entries of its config say where that came from; `_use_default_values` is in no fixed order.
    """
    settings = {"class": type(scheduler).__name__}
    for name, value in scheduler.config.items():
        if not name.startswith("_"):
            settings[name] = value
    return settings


def marks(tokenizer: Any, captions: list[str], anchors: list[str]) -> Tensor:
    """Return (N, L) int64: 1 for the concept's tokens, 2 for the first <|endoftext|>, 0 elsewhere.

    The concept's tokens of a caption are those that its anchor's caption does not share at their place: "cat" of "a
    cat in neon style" whose anchor is "a dog in neon style", "a cat" where it is "an object in neon style".
    """
    rows = []
    for caption, anchor in zip(_ids(tokenizer, captions), _ids(tokenizer, anchors), strict=True):
        rows.append(_marks(caption, anchor, tokenizer.eos_token_id))
    return torch.tensor(rows)


def check_captions(tokenizer: Any, examples: Iterable[Example]) -> None:
    """Raise UserError for a caption that says no more than its anchor: none of its tokens is the concept's."""
    for example in examples:
        if CONCEPT not in marks(tokenizer, [example.caption], [example.anchor]):
            raise UserError(
                f"the caption {example.caption!r} says no more than its anchor {example.anchor!r}: give another "
                "--anchor"
            )


def subjects(tokenizer: Any, captions: list[str], anchors: list[str]) -> Tensor | None:
    """Return (N, 2) int64: the last of the concept's tokens in its caption, and its place in the anchor's.

    The places are alike counted from the end: what follows the concept is the same in both. None where a caption says
    no more than its anchor: `check_captions` refuses it for the methods that need its words.
    """
    places = []
    for anchor, mark in zip(anchors, marks(tokenizer, captions, anchors).tolist(), strict=True):
        if CONCEPT not in mark:
            return None
        last = len(mark) - 1 - mark[::-1].index(CONCEPT)
        end = _ids(tokenizer, [anchor])[0].index(tokenizer.eos_token_id)
        places.append((last, last + end - mark.index(END)))
    return torch.tensor(places)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return token ids as the pipelines of Stable Diffusion make them: all of one length."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids


def _marks(caption: list[int], anchor: list[int], end_token: int) -> list[int]:
    """Return the marks of one caption, one per token."""
    end = caption.index(end_token)
    words, anchor_words = caption[:end], anchor[: anchor.index(end_token)]
    mark = [0] * len(caption)
    mark[:end] = [CONCEPT] * end
    for block in SequenceMatcher(None, words, anchor_words, autojunk=False).get_matching_blocks():
        mark[block.a : block.a + block.size] = [0] * block.size  # shared with the anchor
    mark[end] = END
    return mark
