"""From what the user asked for to every value of a run: preset, then what was given; free of torch."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from classification.methods import METHODS
from classification.presets import PRESETS, TRAINING, TUNED
from classification.settings import ClassifierSettings, Data
from erase_sd.common.cli import filled, knob, names
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
    train_seed: int = knob(0, "seed of the network that knows everything")
    output_dir: str = knob("runs/classification", "folder of all runs, each in a folder of its own")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = knob(None, "autocast; by default accelerate's setting")
    checkpointing_steps: int = knob(500, "steps between two checkpoints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTraining(Descent):
    """How the network that knows everything is trained."""

    model: str = knob("smallnet", "resnet18, resnet34, smallnet, or a transformers image classifier by folder or id")
    weights: str | None = knob(None, '"hub" or a file of torchvision weights to start from')
    epochs: float = knob(30, "walks through the training data")
    batch_size: int = knob(64, "examples per step, over all processes")


class ClassifierPlan(NamedTuple):
    """Every value of a run; where there are epochs, the method's steps follow from them and the data."""

    job: ClassifierJob
    data: Data
    losses: ClassifierSettings
    method: Any  # a dataclass of METHODS

    def config(self) -> dict[str, Any]:
        """All values that decide the result, as JSON holds them."""
        values = {k: v for part in self for k, v in dataclasses.asdict(part).items() if k not in HOW}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def groups(method: str) -> dict[str, type]:
    """The dataclasses whose fields are the options of a method. Raises UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    return {"job": ClassifierJob, "data": Data, "losses": ClassifierSettings, "method": METHODS[method]}


def make(**given: Any) -> ClassifierPlan:
    """The plan for these values; the others come from the preset, then from the knobs' defaults.

    Raises UserError for an unknown method, preset, knob or choice, and as the knobs do.
    """
    method = given.get("method", "scissorhands")
    classes = groups(method)
    unknown = set(given) - set().union(*map(names, classes.values()))
    if unknown:
        raise UserError(f"{method} has no knob {sorted(unknown)[0]!r}: see --help")
    dataset, presets = given.get("dataset", "digits"), PRESETS[method]
    preset = given.get("preset") or next((p for p in (dataset, f"authors/{dataset}") if p in presets), None)
    if preset is not None and preset not in presets:
        raise UserError(f"unknown preset {preset!r}: {method} has {', '.join(presets)}")
    kind = given.get("forget", Data.forget).partition(":")[0]
    tuned = {} if given.get("preset") else TUNED.get(dataset, {}).get(kind, {}).get(method, {})
    values = (presets[preset] if preset else {}) | tuned | given | {"preset": preset}
    values |= {"epochs": None} if "steps" in given else {}
    return ClassifierPlan(*(filled(cls, values) for cls in classes.values()))


def training(dataset: str, **given: Any) -> ClassifierTraining:
    """The recipe of a data set, with changes."""
    return filled(ClassifierTraining, TRAINING[dataset] | given)
