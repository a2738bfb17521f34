"""What every method declares, what methods of one loss share, and the pieces that several methods' presets share.

A preset is a named set of options; what it leaves out has the option's own default. Every method has "sd" and
"pocket", in which `train_scope` says what is trained and `anchor_model` "original" keeps a copy of the original model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from erase_sd.core.descent import Descent, descend
from erase_sd.core.task import Task, terms

POCKET = {  # the same images for every method, so that runs side by side sample them once
    "batch_size": 32,
    "sample_guidance": 3.5,
    "sample_steps": 15,
    "forget_images": 192,
    "retain_images": 384,
}
GENTLE = {"optimizer": "adamw", "schedule": "cosine", "train_scope": "full", "anchor_model": "current"}
CONSTANT = GENTLE | {"schedule": "constant", "drop_captions": 0.0}  # as most released code trains

STRONG = ("lr", "lam", "fraction")  # options that can be too strong, in the order in which to doubt them


class Sizes(NamedTuple):
    """Numbers of parameters that decide how much memory a job needs."""

    network: int
    others: int  # text encoders and autoencoder
    trained: int
    trimmable: int
    ranked: int
    touched: int  # those of the network that have a gradient


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: a frozen dataclass of its options, called on a task, with what it needs declared.

    A call yields (record, state) after each step, or once if it has no steps; given its last state, it does nothing.
    What a base says is overridden by a field, a class attribute or a property of the same name. `Method` comes last
    among the bases of a class, so that the options of `Descent` win over the declarations of methods without steps.
    """

    # Without annotations, or each would take the place of an option of the same name in the order of the options.
    trains = True  # False: no weight moves, the network carries a hook instead
    steps = 1
    reads_words = False  # it needs to know which words of a caption its anchor has not
    words_only = False  # no images are needed: forget_images and retain_images count captions
    needs_original = False  # its losses do not exist without the original model's predictions
    asks_original = True  # a loss uses the original model where it is kept
    needs_anchor_pictures = False
    optimizer = None
    rounding = "nearest"
    state_bytes = 0  # that the optimizer keeps per trained entry
    sensitivity_batches = 0
    sensitivity_passes = 0  # gradients that are averaged over those batches before the first step
    stored_gradients = 0  # besides the one that is computed

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Erase, in place; yield (record, state) after each step. Raise FloatingPointError for a lost model."""
        raise NotImplementedError

    def check_network(self, model: nn.Module, trained: Collection[str]) -> None:
        """Raise UserError for a network that it cannot erase from, training the parameters of these names."""

    def trims(self) -> bool:
        """Return whether weights are re-initialised: only then does trim_scope have a meaning."""
        return False

    def kept_bytes(self, width: int) -> int:
        """Return the bytes per trained entry that travel in the state beside the optimizer's.

        `width` is that of a weight in bytes: 4, or 2 in bf16.
        """
        return 0

    def ask_original(self, task: Task, batch: Any, step: int) -> None:
        """Compute, of a micro-batch, all losses that ask the original model: it may have to answer before it goes."""
        task.redirect(batch)

    def averaged(self, n: Sizes) -> int:
        """Return the number of entries whose gradients are averaged before the first step."""
        return n.ranked

    def memory(self, n: Sizes, width: int) -> dict[str, dict[str, int]]:
        """Return the bytes of tensors that the method holds beside the networks, by phase and purpose."""
        phases = {}
        if self.sensitivity_passes:
            means = 4 * self.sensitivity_passes * self.averaged(n)
            phases["sensitivity"] = {"gradient": 4 * n.touched, "running means": means}
        if self.optimizer is not None:
            phases["steps"] = {
                "gradient": 4 * n.touched,
                "stored gradient": width * n.trained * self.stored_gradients,
                "optimizer": self.state_bytes * n.trained,
                "kept by the method": self.kept_bytes(width) * n.trained,
            }
        return phases

    def too_strong(self) -> list[str]:
        """Return the names of the options to lower when a run loses the model."""
        own = {field.name for field in fields(self)}
        return [name for name in STRONG if name in own]


@dataclass(frozen=True, kw_only=True)
class Objective(Descent, Method):
    """A method that minimises one loss over the trainable weights: `objective` is all that its classes differ in."""

    def objective(self, task: Task, batch: Any, step: int) -> Tensor | Iterable[Tensor]:
        """Return the loss of a batch at a step: a scalar, or yield the terms that add up to it."""
        raise NotImplementedError

    def ask_original(self, task: Task, batch: Any, step: int) -> None:
        """Compute the objective's terms."""
        for _ in terms(self.objective(task, batch, step)):
            pass

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend, in place; yield (record, state) after each step."""
        return descend(task, self, partial(self.objective, task), state)
