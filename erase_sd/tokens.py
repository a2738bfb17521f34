"""Where a concept's words stand in a caption, in tokens."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from erase_sd.process import UserError

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
