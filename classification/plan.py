"""From what the user asked for to every value of a run: preset, then what was given."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from classification.methods import FORGET_WALKERS, METHODS
from classification.methods.badteacher import BadTeacher
from classification.methods.lotus import Lotus
from classification.methods.salun import ClassifierSalUn
from classification.presets import PRESETS, TRAINING, TUNED
from classification.settings import ClassifierSettings, Data, Scoring
from erase_sd.common.cli import assemble, filled, knob, names
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent

HOW = {"output_dir", "data_dir", "mixed_precision", "checkpointing_steps", "raw"}  # not what a run computes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierJob:
    """What to do with which network, and where the result goes."""

    method: str = knob("scissorhands", "how to forget")
    preset: str | None = knob(None, "named set of the method's values (default: the data set's)")
    seed: int = knob(0, "seed of every draw of the method")
    epochs: float | None = knob(None, "walks through the data, instead of --steps")
    raw: str | None = knob(None, "folder of the trained network (default: the recipe's, trained if it is missing)")
    train_seed: int = knob(0, "seed of the original model")
    output_dir: str = knob("runs/classification", "folder of all runs, each in a folder of its own")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = knob(
        None, "autocast; by default accelerate's setting; fp16 is refused"
    )
    checkpointing_steps: int = knob(500, "steps between two checkpoints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTraining(Descent):
    """How the original model is trained."""

    model: str = knob(
        "smallnet", "resnet18, resnet34, smallresnet, smallnet, or a transformers image classifier by folder or id"
    )
    weights: str | None = knob(None, '"hub" or a file of torchvision weights to start from')
    epochs: float = knob(30, "walks through the training data")
    batch_size: int = knob(64, "examples per step, over all processes")


class ClassifierPlan(NamedTuple):
    """Every value of a run; where there are epochs, the method's steps follow from them and the data."""

    job: ClassifierJob
    data: Data
    losses: ClassifierSettings
    scoring: Scoring
    method: Any  # a dataclass of METHODS

    def config(self) -> dict[str, Any]:
        """Return all values that decide the result, as JSON holds them."""
        values: dict[str, Any] = {}
        for part in self:
            values |= dataclasses.asdict(part)
        config = {}
        for name, value in values.items():
            if name not in HOW:
                config[name] = list(value) if isinstance(value, tuple) else value
        return config

    def walked(self) -> str:
        """Return what an epoch of the method walks through, as `ClassificationTask.epoch` knows it."""
        if isinstance(self.method, ClassifierSalUn) and self.method.walk != "pairs":
            return self.method.walk
        if isinstance(self.method, BadTeacher | Lotus):
            return "joint"
        return "forget" if self.job.method in FORGET_WALKERS else "retain"

    def retain_share(self) -> float:
        """Return the share of the retain set that an epoch of the method walks through."""
        return self.method.retain_share if isinstance(self.method, BadTeacher | Lotus) else 1.0


def groups(method: str) -> dict[str, type]:
    """Return the dataclasses whose fields are the options of a method. Raises UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    return {
        "job": ClassifierJob,
        "data": Data,
        "losses": ClassifierSettings,
        "scoring": Scoring,
        "method": METHODS[method],
    }


def make(**given: Any) -> ClassifierPlan:
    """Return the plan for these values; the others come from the preset, then from the options' defaults.

    Without a preset the method's values are the data set's and, over them, those that `classification.search` found.
    Raises UserError for an unknown method, preset, option or choice, where nobody knows values, and as the options'
    dataclasses do.
    """
    method, dataset = given.get("method", "scissorhands"), given.get("dataset", Data.dataset)
    classes = groups(method)
    presets = PRESETS.get(method, {})
    preset = given.get("preset") or _usual_preset(method, dataset)
    if preset is not None and preset not in presets:
        raise UserError(f"unknown preset {preset!r}: {method} has {', '.join(presets) or 'none'}")
    values = dict(presets[preset]) if preset else {}
    if not given.get("preset"):
        kind = given.get("forget", Data.forget).partition(":")[0]
        values |= TUNED.get(dataset, {}).get(kind, {}).get(method, {})
    given["preset"] = preset
    if "steps" in given:
        given["epochs"] = None
    plan = ClassifierPlan(*assemble(classes.values(), values, given))
    if not values:
        _check_given(method, dataset, given)
    return plan


def _check_given(method: str, dataset: str, given: dict[str, Any]) -> None:
    """Raise UserError where options were left to their defaults, which suit no data set: they hardly move a weight."""
    own = names(METHODS[method])
    needed = [{"lr"}, {"steps", "epochs"}] if issubclass(METHODS[method], Descent) else [own]
    if not own or all(some & given.keys() for some in needed):
        return
    raise UserError(
        f"{method} has no values for {dataset}: search (python -m classification.search --dataset {dataset} --methods "
        f"{method}), or give --preset {', '.join(PRESETS[method])}"
    )


def _usual_preset(method: str, dataset: str) -> str | None:
    """Return the preset of a method on a data set where none is given: ours, the released code's, or none."""
    for name in (dataset, f"authors/{dataset}"):
        if name in PRESETS.get(method, {}):
            return name
    return None


def training(dataset: str, **given: Any) -> ClassifierTraining:
    """Return the training recipe of a data set, with changes."""
    return filled(ClassifierTraining, TRAINING[dataset] | given)
