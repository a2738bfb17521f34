"""From what the user asked for to every value of the job: the preset's, then what was given."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from erase_sd.common.cli import filled, names
from erase_sd.common.errors import UserError
from erase_sd.methods import METHODS, PRESETS
from erase_sd.methods.base import Method
from erase_sd.settings import Job, Running, Sampling, TaskSettings

# How and where a job runs, not what it computes.
HOW = {"mixed_precision", "fsdp", "gradient_checkpointing", "output_dir", "score", *names(Running)}
OWN = {"unet", "text_encoder", "adapter"}  # part of a job that has them, and of no other
ONCE = {"resume_from_checkpoint", "dry_run"}  # said of one call, not of the job


class Plan(NamedTuple):
    """Every value of a job."""

    job: Job
    method: Method
    sampling: Sampling
    losses: TaskSettings
    running: Running

    def config(self) -> dict[str, Any]:
        """Return all values that decide the result, as JSON holds them: runs with equal ones are the same run."""
        config: dict[str, Any] = {}
        for name, value in _values(self).items():
            if name in HOW or (name in OWN and not value):
                continue
            config[name] = list(value) if isinstance(value, tuple) else value
        return config | {"mixed_precision": self.job.mixed_precision}

    def used_losses(self) -> TaskSettings:
        """Return the losses without what the method does not use: scopes of a trim, a copy of the original model."""
        losses = self.losses
        if not self.method.trims():
            losses = dataclasses.replace(losses, trim_scope=losses.train_scope, rank_scope=None)
        if not self.method.asks_original:
            losses = dataclasses.replace(losses, anchor_model="current")
        return losses

    def chose_trim_scope(self) -> bool:
        """Return whether the trim scope was asked for: it is not the one that the preset brings."""
        preset = PRESETS[self.job.method][self.job.preset]
        return self.losses.trim_scope != preset.get("trim_scope", TaskSettings().trim_scope)

    def options(self) -> list[str]:
        """Return the command line of this job: what its preset and the defaults do not say already."""
        given = _values(self)
        asked = {name: given[name] for name in ("concept", "model", "method", "preset")}
        if given["weights_dtype"] != Job().weights_dtype:  # decides the rounding, as a preset would
            asked["weights_dtype"] = given["weights_dtype"]
        usual = _values(make(**asked))
        words: list[str] = []
        for name, value in asked.items():
            words += _words(name, value)
        for name, value in given.items():
            if name not in asked and name not in ONCE and value != usual[name]:
                words += _words(name, value)
        return words


def groups(method: str) -> dict[str, type]:
    """Return the dataclasses whose fields are the options of a method. Raises UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    return {"job": Job, "method": METHODS[method], "sampling": Sampling, "losses": TaskSettings, "running": Running}


def _words(name: str, value: Any) -> list[str]:
    """Return one option as it is typed."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", "none" if value is None else str(value)]


def _values(plan: Plan) -> dict[str, Any]:
    """Return the values of all parts by option; no two parts have one of the same name."""
    values: dict[str, Any] = {}
    for part in plan:
        values |= dataclasses.asdict(part)
    return values


def make(**given: Any) -> Plan:
    """Return the plan for these values; the others come from the preset, then from the options' defaults.

    Raises UserError for an unknown method, preset, option or choice, for a missing concept, for a method that needs
    the original model or the anchors' images but may not have them, and as the options' dataclasses do.
    """
    method = given.get("method", "scissorhands")
    classes = groups(method)
    known = set().union(*map(names, classes.values()))
    for name in sorted(set(given) - known):
        raise UserError(f"{method} has no knob {name!r}: see --help")
    given["concept"], given["anchor"] = _texts(given.get("concept")), _texts(given.get("anchor"))
    if not given["concept"] or not all(text.strip() for text in given["concept"]):
        raise UserError("the concept is empty: give --concept, such as --concept cat")
    preset = given.get("preset") or ("pocket" if given.get("model") == "pocket" else "sd")
    if preset not in PRESETS[method]:
        raise UserError(f"unknown preset {preset!r}: {method} has {', '.join(PRESETS[method])}")
    values = PRESETS[method][preset] | given | {"preset": preset}
    if values.get("weights_dtype") == "bfloat16":
        values.setdefault("rounding", "kahan")  # nearest would lose most changes of small steps
    plan = Plan(*(filled(cls, values) for cls in classes.values()))
    _check_needs(plan)
    _check_schedule(plan, given)
    return plan


def _texts(given: Any) -> tuple[str, ...]:
    """Return one text, several or none as a tuple."""
    if isinstance(given, str):
        return (given,)
    return tuple(given or ())


def _check_schedule(plan: Plan, given: dict[str, Any]) -> None:
    """Raise UserError for a warm-up or milestones that were asked for and that the steps never see.

    A preset's own warm-up may be longer than a short trial.
    """
    steps, warmup = getattr(plan.method, "steps", 0), given.get("warmup_steps", 0)
    if warmup > steps:
        raise UserError(f"--warmup_steps {warmup} is more than the {steps} steps: give fewer")
    for share in given.get("milestones", ()):
        if not 0 <= share <= 1:
            raise UserError(f"--milestones {share} is outside [0, 1]: give shares of the steps")


def _check_needs(plan: Plan) -> None:
    """Raise UserError for a method that may not have what it needs."""
    method, name = plan.method, plan.job.method
    if method.needs_original and plan.losses.anchor_model != "original":
        raise UserError(f"{name} learns from the original network: give --anchor_model original")
    if method.needs_anchor_pictures and not plan.sampling.anchor_pictures:
        raise UserError(f"{name} learns the anchors' pictures: give --anchor_pictures")
    if method.rounding != "nearest" and plan.job.weights_dtype == "float32":
        raise UserError(f"--rounding {method.rounding} is of bf16 weights: give --weights_dtype bfloat16 too")
