"""From what the user asked for to every value of the job: preset, then what was given; free of torch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from erase_sd.common.cli import filled, names
from erase_sd.common.errors import UserError
from erase_sd.methods import METHODS
from erase_sd.presets import PRESETS
from erase_sd.settings import Job, Running, Sampling, TaskSettings

# How and where a job runs, not what it computes.
HOW = {"mixed_precision", "fsdp", "gradient_checkpointing", "output_dir", *names(Running)}
ONCE = {"resume_from_checkpoint", "dry_run"}  # said of one call, not of the job


class Plan(NamedTuple):
    """Every value of a job."""

    job: Job
    method: Any  # a dataclass of METHODS
    sampling: Sampling
    losses: TaskSettings
    running: Running

    def config(self) -> dict[str, Any]:
        """All values that decide the result, as JSON holds them: two runs with the same one are the same run."""
        values = {k: v for part in self for k, v in dataclasses.asdict(part).items() if k not in HOW}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {"mixed_precision": self.job.mixed_precision}

    def trims(self) -> bool:
        """Whether the method re-initialises weights: only then has trim_scope a meaning."""
        return bool(getattr(self.method, "fraction", 0))

    def used_losses(self) -> TaskSettings:
        """The losses without what the method does not use: the scopes of a trim, a copy of the original network."""
        own = {} if self.trims() else {"trim_scope": self.losses.train_scope, "rank_scope": None}
        own |= {} if getattr(self.method, "asks_original", True) else {"anchor_model": "current"}
        return dataclasses.replace(self.losses, **own)

    def options(self) -> list[str]:
        """The command line of this job: what its preset and the defaults do not say already."""
        given = _values(self)
        asked = {name: given[name] for name in ("concept", "model", "method", "preset")}
        usual = _values(make(**asked))
        more = {name: value for name, value in given.items() if name not in {*asked, *ONCE} and value != usual[name]}
        return [word for name, value in (asked | more).items() for word in _words(name, value)]


def groups(method: str) -> dict[str, type]:
    """The dataclasses whose fields are the options of a method. Raises UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    return {"job": Job, "method": METHODS[method], "sampling": Sampling, "losses": TaskSettings, "running": Running}


def _words(name: str, value: Any) -> list[str]:
    """One option as it is typed."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", "none" if value is None else str(value)]


def _values(plan: Plan) -> dict[str, Any]:
    return {name: value for part in plan for name, value in dataclasses.asdict(part).items()}


def make(**given: Any) -> Plan:
    """The plan for these values; the others come from the preset, then from the knobs' defaults.

    Raises UserError for an unknown method, preset, knob or choice, for a missing concept, for a method that needs the
    original network or the anchors' pictures but may not have them, and as the knobs do.
    """
    method = given.get("method", "scissorhands")
    classes = groups(method)
    unknown = set(given) - set().union(*map(names, classes.values()))
    if unknown:
        raise UserError(f"{method} has no knob {sorted(unknown)[0]!r}: see --help")
    for name in ("concept", "anchor"):
        given[name] = (given[name],) if isinstance(given.get(name), str) else tuple(given.get(name) or ())
    if not given["concept"] or not all(text.strip() for text in given["concept"]):
        raise UserError("the concept is empty: give --concept, such as --concept cat")
    preset = given.get("preset") or ("pocket" if given.get("model") == "pocket" else "sd")
    if preset not in PRESETS[method]:
        raise UserError(f"unknown preset {preset!r}: {method} has {', '.join(PRESETS[method])}")
    values = PRESETS[method][preset] | given | {"preset": preset}
    plan = Plan(*(filled(cls, values) for cls in classes.values()))
    if getattr(plan.method, "needs_original", False) and plan.losses.anchor_model != "original":
        raise UserError(f"{method} learns from the original network: give --anchor_model original")
    if getattr(plan.method, "needs_anchor_pictures", False) and not plan.sampling.anchor_pictures:
        raise UserError(f"{method} learns the anchors' pictures: give --anchor_pictures")
    if getattr(plan.method, "rounding", "nearest") != "nearest" and plan.job.weights_dtype == "float32":
        raise UserError(f"--rounding {plan.method.rounding} is of bf16 weights: give --weights_dtype bfloat16 too")
    return plan
