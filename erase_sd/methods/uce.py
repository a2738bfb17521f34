"""UCE: new keys and values for the text, in closed form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob, not_negative
from erase_sd.common.errors import UserError
from erase_sd.core.task import DiffusionTask
from erase_sd.methods.base import POCKET, Method

PROJECTIONS = (".attn2.to_k.weight", ".attn2.to_v.weight")

EDIT = {"train_scope": "kv", "anchor_model": "current"}
PRESETS = {
    # trainscripts/uce_sd_erase.py, which preserves nothing by default
    "authors": EDIT | {"tokens": "last", "preserve_scale": 0.0},
    "sd": EDIT,
    "pocket": EDIT | POCKET,
}


@dataclass(frozen=True, kw_only=True)
class UCE(Method):
    """UCE, Gandikota et al., WACV 2024, arXiv 2308.14761: the W' that gives the concept's tokens the anchor's answers.

    W' minimises  s_e E |W' c - W g|^2 + s_p E |W' p - W p|^2 + lam |W' - W|^2  for every key and value projection of
    the cross-attention: c, g are tokens of the captions of all concepts and of their anchors, p those of the retain
    captions. E sums over the tokens of a caption and averages over captions, so that the scales do not depend on how
    many there are; with one caption each it is the published sum.
    """

    asks_original: ClassVar[bool] = False
    words_only: ClassVar[bool] = True
    reads_words: ClassVar[bool] = True

    erase_scale: float = knob(1.0, "s_e, weight of the concepts")
    preserve_scale: float = knob(1.0, "s_p, weight of the retain captions")
    lam: float = knob(0.5, "weight of staying near the old weights, in squared units of text embeddings")
    tokens: Literal["all", "last"] = knob(
        "all", "from the concept's last token to the end (paper's code), or that token alone (current code)"
    )

    def __post_init__(self) -> None:
        """Raise UserError for a negative number, and for lam 0, which leaves directions that no caption uses open."""
        not_negative(self)
        if not self.lam:
            raise UserError("--lam 0 leaves the equations without a unique solution: give more than 0, such as 0.5")

    def check_network(self, model: nn.Module, trained: Collection[str]) -> None:
        """Raise UserError if no projection is trained, as in a transformer, which has none."""
        if not any(name.endswith(PROJECTIONS) for name in trained):
            raise UserError("uce edits attn2.to_k and attn2.to_v, of which --train_scope has none: use a UNet and kv")

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Replace the trainable projections, in place; yield once."""
        if state is not None:
            return
        theta = {name: p for name, p in task.trainable().items() if name.endswith(PROJECTIONS)}
        M = self.solve(self.pairs(task), task.samples.kept())
        moved = total = 0.0
        for p in theta.values():
            W = p.detach().cpu().double()
            moved += float((W @ M - W).square().sum())
            total += float(W.square().sum())
            p.data.copy_(W @ M)
        moved, total = task.shards.all_reduce(torch.tensor([moved, total])).tolist()
        yield {"step": 0, "moved": (moved / total) ** 0.5}, {"step": 1, "optimizer": {}}

    def pairs(self, task: DiffusionTask) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tokens (tokens, D) of each concept caption that are edited, with those of its anchor."""
        end = None if self.tokens == "all" else 1
        for c, g in task.samples.pairs():
            yield c[:end], g[:end]

    def solve(self, pairs: Iterable[tuple[Tensor, Tensor]], kept: Iterable[Tensor]) -> Tensor:
        """Return M (D, D), fp64, with W' = W M for every W; of pairs (c, g) and kept p, all (tokens, D).

        M = (lam I + s_e E g'c + s_p E p'p) (lam I + s_e E c'c + s_p E p'p)^-1, tokens being rows.
        """
        gc, cc = mean(torch.stack([g.T @ c, c.T @ c]) for c, g in pairs)
        rest = self.preserve_scale * mean(p.T @ p for p in kept) + self.lam * torch.eye(len(cc), dtype=cc.dtype)
        return torch.linalg.solve(rest + self.erase_scale * cc, rest + self.erase_scale * gc, left=False)


def mean(products: Iterable[Tensor]) -> Tensor:
    """Return the mean of tensors that come one by one, fp64."""
    total, n = 0, 0
    for x in products:
        total = total + x.double()
        n += 1
    return total / n
