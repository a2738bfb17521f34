"""Forget-Me-Not: make the picture attend to the concept's words no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from erase_sd.core.task import DiffusionTask


@dataclass(frozen=True, kw_only=True)
class ForgetMeNot(Descent):
    """FMN, Zhang et al., CVPR workshops 2024, arXiv 2303.17591: descend the L2 norm of the attention to the concept.

    The norm is over all cross-attention layers, heads, pixels and concept's tokens of a picture together; published
    batches hold one picture, ours average the pictures' norms. The model's own pictures stand for the real ones, and
    there is no textual inversion. No loss retains anything: few steps and a tiny rate do. The concept's tokens
    are those that the anchor's caption does not share (erase_sd.tokens).
    """

    pooler: bool = knob(
        True, "the first <|endoftext|> as well, which sums the caption up; the released code takes the padding too"
    )

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend the attention; the processors that record it are installed as long as the loop runs."""
        import torch
        from torch.linalg import vector_norm

        from erase_sd.core.descent import descend

        with recorded(task.model) as layers:

            def objective(b: Any, step: int) -> Tensor:
                layers.clear()
                task.predict(task.add_noise(b.z_f, b.noise_f, b.t_f), b.t_f, b.c_f)
                if not (b.marks == 1).any(1).all():
                    raise UserError("a caption says no more than its anchor: give another --anchor")
                marked = b.marks > 0 if self.pooler else b.marks == 1
                norms = [vector_norm(p * marked[:, None, None, :], dim=(1, 2, 3)) for p in layers]
                return vector_norm(torch.stack(norms), dim=0).mean()

            yield from descend(task, self, objective, state)


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Tensor]]:
    """The probabilities (n, heads, pixels, tokens) of every cross-attention called inside, fp32, in a list to clear.

    Raises UserError for a network without cross-attention layers (attn2), such as a transformer with joint attention.
    """
    layers: list[Tensor] = []

    def processor(attn: Any, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        """diffusers' AttnProcessor as a transformer block needs it, keeping the probabilities."""
        q, k, v = attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (attn.head_to_batch_dim(y) for y in (q, k, v))
        mask = attn.prepare_attention_mask(attention_mask, encoder_hidden_states.shape[1], len(x))
        p = attn.get_attention_scores(q, k, mask)
        layers.append(p.unflatten(0, (len(x), -1)).float())
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(p @ v)))

    crossing = [m for name, m in network.named_modules() if name.endswith(".attn2")]
    if not crossing:
        raise UserError("forget-me-not needs cross-attention layers: erase from Stable Diffusion 1, 2 or XL")
    before = [m.processor for m in crossing]
    for m in crossing:
        m.processor = processor
    try:
        yield layers
    finally:
        for m, old in zip(crossing, before, strict=True):
            m.processor = old
