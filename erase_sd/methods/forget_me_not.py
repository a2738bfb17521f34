"""Forget-Me-Not: make the image attend to the concept's words no more."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent, descend
from erase_sd.core.task import DiffusionTask
from erase_sd.methods.base import CONSTANT, GENTLE, POCKET, Method

PRESETS = {
    # configs/attn.yaml, less textual inversion.
    "authors": CONSTANT | {"lr": 2e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 1, "steps": 35},
    "sd": GENTLE | {"lr": 2e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 1, "steps": 35},
    "pocket": GENTLE | POCKET | {"lr": 6e-5, "weight_decay": 0.01, "max_grad_norm": 1.0, "steps": 35},
}


@dataclass(frozen=True, kw_only=True)
class ForgetMeNot(Descent, Method):
    """FMN, Zhang et al., CVPR workshops 2024, arXiv 2303.17591: descend the L2 norm of the attention to the concept.

    The norm is over all cross-attention layers, heads, pixels and concept's tokens of an image together; published
    batches hold one image, ours average the images' norms. The model's own images stand for the real ones, and there
    is no textual inversion. No loss retains anything: few steps and a tiny rate do. The concept's tokens are those
    that the anchor's caption does not share (erase_sd.denoising.samples).
    """

    reads_words: ClassVar[bool] = True

    pooler: bool = knob(
        True, "the first <|endoftext|> as well, which sums the caption up; the released code takes the padding too"
    )

    def check_network(self, model: nn.Module, trained: Collection[str]) -> None:
        """Raise UserError for a network without cross-attention layers (attn2), such as one with joint attention."""
        if not any(name.endswith(".attn2") for name, _ in model.named_modules()):
            raise UserError("forget-me-not needs cross-attention layers: erase from Stable Diffusion 1, 2 or XL")

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend the attention; the processors that record it are installed as long as the loop runs."""
        with recorded(task.model) as layers:

            def objective(batch: Any, step: int) -> Tensor:
                layers.clear()
                answer = task.predict(task.add_noise(batch.z_f, batch.noise_f, batch.t_f), batch.t_f, batch.c_f)
                # 0 times the answer: DDP waits for a gradient of every parameter, those after the attention too
                return self.attention(layers, batch.marks) + 0 * answer.sum()

            yield from descend(task, self, objective, state)

    def attention(self, layers: list[Tensor], marks: Tensor) -> Tensor:
        """Return the mean over the images of the norm of what `layers` attend to the marked tokens.

        `layers` are (n, heads, pixels, tokens); `marks` (n, tokens) are 1 where the concept stands and 2 at the first
        <|endoftext|>. Raises UserError for a caption without the concept.
        """
        if not (marks == 1).any(1).all():
            raise UserError("a caption says no more than its anchor: give another --anchor")
        marked = marks > 0 if self.pooler else marks == 1
        norms = []
        for probabilities in layers:
            norms.append(vector_norm(probabilities * marked[:, None, None, :], dim=(1, 2, 3)))
        return vector_norm(torch.stack(norms), dim=0).mean()


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the maps of each cross-attention called inside: fp32 (n, heads, pixels, tokens)."""
    layers: list[Tensor] = []

    def processor(attn: Any, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        """Attend as diffusers' AttnProcessor does in a transformer block, and keep the probabilities."""
        q = attn.head_to_batch_dim(attn.to_q(x))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        mask = attn.prepare_attention_mask(attention_mask, encoder_hidden_states.shape[1], len(x))
        p = attn.get_attention_scores(q, k, mask)
        layers.append(p.unflatten(0, (len(x), -1)).float())
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(p @ v)))

    crossing = [module for name, module in network.named_modules() if name.endswith(".attn2")]
    own = [module.processor for module in crossing]
    for module in crossing:
        module.processor = processor
    try:
        yield layers
    finally:
        for module, processor_before in zip(crossing, own, strict=True):
            module.processor = processor_before
