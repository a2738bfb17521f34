"""The options of the commands that belong to no method: which examples, and how they are shown to the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples."""

    dataset: Literal[
        "fashion", "digits", "cifar10", "cifar100", "svhn", "celeba", "fashion-mnist", "mnist", "kmnist"
    ] = knob("fashion", "what the images are of; fashion and digits are embedded")
    data_dir: str | None = knob(None, "folder with the data in their original format (default: the Hub)")
    split_seed: int = knob(0, "seed of the validation split")
    forget: str = knob("random:0.1", "what to forget: random:SHARE, class:N, identities:N, indices:FILE")
    forget_seed: int = knob(0, "seed of the choice of the forget set")
    authors_split: bool = knob(False, "draw both as the released code does, where the seeds are one")


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """How the data are shown to the network, and which weights may change."""

    batch_size: int = knob(128, "examples of each set per step, over all processes")
    batch_norm: Literal["train", "eval"] = knob("train", "statistics that batch norms use while unlearning")
    trim_scope: str = knob(".*", "regular expression of parameters that may be re-initialised; norms never are")
    rank_scope: str | None = knob(None, "parameters among which the top k is taken (default: those of trim_scope)")
    train_scope: str = knob(".*", "regular expression of parameters that are trained")
    relabel: Literal["random", "any", "nearest"] = knob(
        "random", "label that redirect teaches: any other, any at all (released SalUn), or the runner-up"
    )

    def __post_init__(self) -> None:
        """Raise UserError for a batch of nothing."""
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} is too small: give 1 or more")


MIA_FEATURES = ("confidence", "correctness", "entropy", "m_entropy", "prob")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How membership inference is measured."""

    mia_shadow: Literal["random", "first"] = knob(
        "random", "examples that the SVC attack learns from: drawn, or the first of each set (released code)"
    )
    mia_features: tuple[str, ...] = knob(
        ("confidence",), f"what the attack sees of an answer, of {', '.join(MIA_FEATURES)}; the first is the tables'"
    )
    mia_cap: int | None = knob(5000, "most of them of each kind, none for all (released code); its cost is quadratic")

    def __post_init__(self) -> None:
        """Raise UserError for an attack that learns from nothing, or from what nobody measures."""
        for name in self.mia_features:
            if name not in MIA_FEATURES:
                raise UserError(f"--mia_features {name} is unknown: choose among {', '.join(MIA_FEATURES)}")
        if self.mia_cap is not None and self.mia_cap < 1:
            raise UserError(f"--mia_cap {self.mia_cap} is too small: give 1 or more, or none for all")
