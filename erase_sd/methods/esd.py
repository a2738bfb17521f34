"""ESD: teach the network the opposite of its own guidance towards the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import mse_loss

from erase_sd.common.cli import knob
from erase_sd.core.task import DiffusionTask
from erase_sd.methods.base import GENTLE, POCKET, Objective

ORIGINAL = GENTLE | {"schedule": "constant", "anchor_model": "original"}
PRESETS = {
    # The current code: 200 steps with batch 1. x for styles, u for nudity and objects.
    "esd-x": ORIGINAL | {"train_scope": "xattn", "lr": 5e-5, "batch_size": 1, "steps": 200},
    "esd-u": ORIGINAL | {"train_scope": "noxattn", "lr": 5e-5, "batch_size": 1, "steps": 200},
    # The paper's: target from the empty caption, eta 1, which is the same target.
    "paper": ORIGINAL
    | {"start": "nothing", "eta": 1.0, "train_scope": "xattn", "lr": 1e-5, "batch_size": 1, "steps": 1000},
    "sd": ORIGINAL | {"train_scope": "xattn", "lr": 1e-5, "batch_size": 8, "steps": 125},
    "pocket": ORIGINAL | POCKET | {"train_scope": "xattn", "eta": 4.0, "lr": 1e-4, "steps": 200},
}


@dataclass(frozen=True, kw_only=True)
class ESD(Objective):
    """ESD, Gandikota et al., ICCV 2023, arXiv 2303.07345: fit e(x_t, c) to e_0(x_t, s) - eta (e_0(x_t, d) - e_0(x_t)).

    c is a caption that has the concept among other things, d the concept's own words: against the guidance towards all
    of the caption, a style would be erased with every object drawn in it. Where both are the same words, as published,
    s = c with eta 2 (the current code) is the same target as s = "" with eta 1 (the paper). train_scope makes the
    variant: xattn is ESD-x, noxattn ESD-u. Of several concepts each sample goes against its own, as the released code
    takes one of the words in each of its steps, which have one sample. x_t are noised images of the concept that the
    original model sampled whole, once; the published code samples a new one part of the way for every step, which
    costs it most of its time.
    """

    needs_original: ClassVar[bool] = True

    eta: float = knob(2.0, "how far to go against the guidance towards the concept")
    start: Literal["concept", "nothing", "anchor"] = knob("concept", "s, the caption from which to go that way")
    direction: Literal["words", "caption"] = knob("words", "d, what to go against: the concept's words, or c itself")

    def objective(self, task: DiffusionTask, batch: Any, step: int) -> Tensor:
        """Return MSE(e(x_t, c_f), e_0(x_t, s) - eta (e_0(x_t, d) - e_0(x_t, "")))."""
        x_t, n = task.add_noise(batch.z_f, batch.noise_f, batch.t_f), len(batch.z_f)
        captions = {
            "concept": batch.c_f,
            "anchor": batch.c_a,
            "nothing": task.empty_cond(n),
            "words": batch.c_w,
        }
        direction = "words" if self.direction == "words" else "concept"
        e_0: dict[str, Tensor] = {}
        for name in {self.start, direction, "nothing"}:  # each is predicted once
            e_0[name] = task.predict_original(x_t, batch.t_f, captions[name])
        target = e_0[self.start] - self.eta * (e_0[direction] - e_0["nothing"])
        return mse_loss(task.predict(x_t, batch.t_f, batch.c_f), target)
