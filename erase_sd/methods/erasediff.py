"""EraseDiff: keep the retain loss low, subject to the concept's caption being treated like its anchor's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from erase_sd.common.cli import knob
from erase_sd.core.descent import Descent, Term, descend, differentiate, inner
from erase_sd.core.projection import subtract_
from erase_sd.core.task import Params, Task, kept
from erase_sd.methods.base import CONSTANT, GENTLE, POCKET, Method

PRESETS = {
    # sd/train_scripts/train_nsfw.sh: what its loop amounts to is L_r + F. "step 160 is enough".
    "authors-nsfw": CONSTANT
    | {"multiplier": "constant", "lam": 1.0, "train_scope": "noxattn", "lr": 1e-5, "batch_size": 16, "steps": 160},
    # train_cls.sh: "step 60".
    "authors-cls": CONSTANT | {"multiplier": "constant", "lam": 1.0, "lr": 1e-5, "batch_size": 16, "steps": 60},
    "sd": GENTLE | {"lr": 1e-5, "batch_size": 16, "steps": 160},
    "pocket": GENTLE | POCKET | {"eta": 0.5, "lr": 2e-4, "steps": 200},
}


@dataclass(frozen=True, kw_only=True)
class EraseDiff(Descent, Method):
    """EraseDiff, Wu et al., CVPR 2025, arXiv 2401.05779: min L_r subject to F <= min F, F being the redirect loss.

    The value function q = F(theta) - F(theta^K) compares with K inner steps on F; theta^K counts as constant, so that
    grad q = grad F and the direction is g_r + lam g_F. "bome" is the dynamic barrier of BOME (Ye et al., NeurIPS 2022,
    arXiv 2209.08709) with phi = eta |grad q|^2: a step of gradient descent lowers F by lr eta |g_F|^2 or more, up
    to O(lr^2). "cosine" is the authors' DDPM code, which divides by both norms, "constant" their code for SD.
    In all three the inner loop enters no gradient: in their code it changes nothing but the moments of the Adam
    optimizer that it shares with the outer one. Here it is left out.
    """

    multiplier: Literal["bome", "cosine", "constant"] = knob(
        "bome", "lam: max(0, eta - <g_r, g_F> / |g_F|^2), the same with the cosine, or --lam itself"
    )
    eta: float = knob(0.1, "rate at which F has to fall under bome, in units of |g_F|^2; under cosine, a number")
    lam: float = knob(1.0, "weight of F under constant")

    stored_gradients: ClassVar[int] = 1  # g_F

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend along g_r + lam g_F; records hold loss_r (L_r), loss_f (F) and lam as well."""
        now: dict[str, Any] = {}

        def retain(part: Any, step: int) -> Tensor:
            return task.retain(part)

        def before(batch: Any, step: int) -> None:
            values, g_F = differentiate(task, {"F": Term(task.redirect)}, batch, task.trainable())
            now["values"], now["g_F"] = {"loss_f": values["F"]}, kept(g_F, task.trainable())

        def edit(g: Params) -> None:
            g_F = now.pop("g_F")
            lam = self.weight(inner(task, g, g_F), inner(task, g_F, g_F), inner(task, g, g))
            now["values"]["lam"] = lam
            subtract_(g, g_F, -lam)

        for record, after in descend(task, self, retain, state, before=before, edit=edit):
            loss_r, values = record["loss"], now["values"]
            yield record | {"loss": loss_r + values["lam"] * values["loss_f"], "loss_r": loss_r} | values, after

    def weight(self, dot: float, norm2_F: float, norm2_r: float) -> float:
        """Return lam from <g_r, g_F>, |g_F|^2 and |g_r|^2; 0 where F is at a minimum."""
        if self.multiplier == "constant":
            return self.lam
        scale = norm2_F if self.multiplier == "bome" else (norm2_F * norm2_r) ** 0.5
        return max(0.0, self.eta - dot / scale) if scale else 0.0
