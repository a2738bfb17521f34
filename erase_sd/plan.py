"""From what the user asked for to every value of the job: the preset's, then what was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

from erase_sd.common.cli import filled, names
from erase_sd.common.errors import UserError
from erase_sd.methods import METHODS, PRESETS
from erase_sd.methods.base import Method
from erase_sd.settings import SD_V1, Job, Running, Sampling, TaskSettings

# How and where a job runs, not what it computes.
HOW = {"mixed_precision", "fsdp", "gradient_checkpointing", "low_memory", "output_dir", "score", *names(Running)}
# In the configuration, which keys of published results hash, but of no influence on a run but its rounding errors.
FREE = frozenset({"gradient_accumulation_steps", "sample_batch_size"})
LEAN = {  # what --low_memory puts in the place of what
    "projection": ("after-preconditioning", "on"),  # which the rounding of bf16 weights would undo
    "rounding": ("nearest", "kahan"),
    "optimizer": ("adamw", "adamw8bit"),
}
# Part of a job that has them, and of no other.
OWN = {"forget_data", "retain_prompts", "retain_data", "unet", "text_encoder", "adapter"}
# What a model of Stable Diffusion 1 or 2 takes where nothing was asked for; other families have their own.
USUAL = {"sample_guidance": 7.5, "sample_steps": 20, "picture_steps": 30}
ONCE = {"resume_from_checkpoint", "dry_run"}  # said of one call, not of the job


class Plan(NamedTuple):
    """Every value of a job."""

    job: Job
    method: Method
    sampling: Sampling
    losses: TaskSettings
    running: Running

    def config(self, usual: dict[str, Any] = USUAL) -> dict[str, Any]:
        """Return all values that decide the result, as JSON holds them: runs with equal ones are the same run.

        `usual` has what the model's family takes for the values that were left to it.
        """
        config: dict[str, Any] = {}
        for name, value in _values(self).items():
            if name in HOW or (name in OWN and not value):
                continue
            value = usual.get(name) if value is None else value
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

    def step_samples(self) -> int:
        """Return the forget and retain samples of a step, over all processes; 0 for a method that computes none."""
        computes = self.method.trains and not self.method.words_only
        return 2 * self.losses.batch_size if computes else 0

    def chose_trim_scope(self) -> bool:
        """Return whether the trim scope was asked for: it is not the one that the preset brings."""
        preset = PRESETS[self.job.method][self.job.preset]
        return self.losses.trim_scope != preset.get("trim_scope", TaskSettings().trim_scope)

    def lean(self, given: Collection[str] = ()) -> Plan:
        """Return the plan with what --low_memory stands for, but for the options that were given."""
        job = dataclasses.replace(self.job, low_memory=True)
        if "weights_dtype" not in given:
            job = dataclasses.replace(job, weights_dtype="bfloat16")
        changes = {}
        for name, (usual, lean) in LEAN.items():
            if name in names(type(self.method)) and name not in given and getattr(self.method, name) == usual:
                changes[name] = lean
        return self._replace(job=job, method=dataclasses.replace(self.method, **changes))

    def options(self) -> list[str]:
        """Return the command line of this job: what its preset and the defaults do not say already."""
        given = _values(self)
        asked = {name: given[name] for name in ("concept", "model", "method", "preset")}
        for name in ("weights_dtype", "low_memory"):  # decide others, as a preset would
            if given[name] != getattr(Job(), name):
                asked[name] = given[name]
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


def values(method: str, model: str, preset: str | None) -> dict[str, Any]:
    """Return what a method takes on a model where nothing is given. Raises UserError for an unknown preset."""
    preset = preset or ("pocket" if model == "pocket" else "sd")
    if preset not in PRESETS[method]:
        raise UserError(f"unknown preset {preset!r}: {method} has {', '.join(PRESETS[method])}")
    return PRESETS[method][preset] | {"method": method, "model": model, "preset": preset}


def _words(name: str, value: Any) -> list[str]:
    """Return one option as it is typed."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", "none" if value is None else str(value)]


def _values(plan: Plan) -> dict[str, Any]:
    """Return the values of all parts by option; no two parts have one of the same name."""
    found: dict[str, Any] = {}
    for part in plan:
        found |= dataclasses.asdict(part)
    return found


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
    usual = values(method, given.get("model", SD_V1), given.get("preset"))
    wanted = usual | given | {"preset": usual["preset"]}
    if wanted.get("weights_dtype") == "bfloat16":
        wanted.setdefault("rounding", "kahan")  # nearest would lose most changes of small steps
    plan = Plan(*(filled(cls, wanted) for cls in classes.values()))
    if plan.job.low_memory:
        plan = plan.lean(given)
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
