"""What the benchmark runs: methods under the names they have in its tables, suites of them, and rows with their keys.

A row is one method on one concept with one seed. Its key is the hash of everything that decides its numbers: all knobs
of the job, the model's weights and the protocol of the judge. To add a method, add a line to METHODS.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from erase_sd.options import names
from erase_sd.plan import make
from erase_sd.pocket.captions import part_named
from erase_sd.pocket.lessons import HALF
from erase_sd.presets import POCKET
from erase_sd.process import UserError
from erase_sd.runtime import digest, file_digest
from prompts import slug

ORIGINAL = "original"  # the model as it is: the ceiling of every rate and the noise floor of every distance
REFERENCE = 320  # added to a seed for other pictures of the same scenes: after 320 exams all 640 have gone round
DATA = {key: value for key, value in POCKET.items() if key != "batch_size"}  # presets for SD get the same pictures
METHODS: dict[str, dict[str, Any]] = {
    "Scissorhands": {"method": "scissorhands", "preset": "pocket"},
    "Scissorhands (paper)": {"method": "scissorhands", "preset": "paper"},
    "Scissorhands (authors, nsfw)": {"method": "scissorhands", "preset": "authors-nsfw"},
    "Scissorhands (authors, cls)": {"method": "scissorhands", "preset": "authors-cls"},
    "SalUn": {"method": "salun", "preset": "pocket"},
    "gradient ascent": {"method": "ascent", "preset": "pocket"},
    "retain fine-tuning": {"method": "finetune", "preset": "pocket"},
    "ESD-x": {"method": "esd", "preset": "pocket", "train_scope": "xattn"},
    "ESD-u": {"method": "esd", "preset": "pocket", "train_scope": "noxattn"},
    "UCE": {"method": "uce", "preset": "pocket"},
    "Concept Ablation": {"method": "concept-ablation", "preset": "pocket"},
    "EraseDiff": {"method": "erasediff", "preset": "pocket"},
    "Selective Amnesia": {"method": "selective-amnesia", "preset": "pocket"},
    "Forget-Me-Not": {"method": "forget-me-not", "preset": "pocket"},
    "SLD (max)": {"method": "sld", "preset": "pocket"},
}
OURS = METHODS["Scissorhands"]
BASE = OURS | {"projection": "on", "redirect_draws": 1}  # our default until the ablation said otherwise
ABLATION: dict[str, dict[str, Any]] = {
    "base": {},
    "saliency: SNIP, abs(theta g_f)": {"saliency": "abs"},
    "saliency: gradient": {"saliency": "gradient"},
    "saliency: magnitude": {"saliency": "magnitude"},
    "saliency: random": {"saliency": "random"},
    "no trim": {"fraction": 0.0},
    "fraction 0.001": {"fraction": 0.001},
    "fraction 0.01": {"fraction": 0.01},
    "trim: cross-attention": {"trim_scope": "xattn"},
    "trim: all weights": {"trim_scope": "full"},
    "trim and train: cross-attention": {"trim_scope": "xattn", "train_scope": "xattn"},
    "trim and train: the text's keys and values": {"trim_scope": "kv", "train_scope": "kv"},
    "objective: ascent": {"objective": "ascent"},
    "objective: ascent, ceiling 1": {"objective": "ascent", "forget_ceiling": 1.0},
    "constraint: L_f, never released": {"constraint": "forget", "release_at": None},
    "SNIP over all weights; L_f, never released": {
        "saliency": "abs",
        "trim_scope": "full",
        "constraint": "forget",
        "release_at": None,
    },
    "constraint never released": {"release_at": None},
    "projection: off": {"projection": "off"},
    "projection: after preconditioning": {"projection": "after-preconditioning"},
    "retain: data; anchor: current network": {"retain_loss": "data", "anchor_model": "current"},
    "no anchor pictures": {"anchor_pictures": False},
    "retain: data": {"retain_loss": "data"},
    "redirect: noisiest of 3 timesteps": {"redirect_draws": 3},
    "lambda 0.3": {"lam": 0.3},
    "lambda 3": {"lam": 3.0},
    "optimizer: SGD": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
    "one batch of pictures": {"forget_images": 32, "retain_images": 32},
    "32 retain prompts": {"retain_images": 32},
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Methods x concepts x seeds, and how many pictures judge each."""

    methods: dict[str, dict[str, Any]]
    concepts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    forget_pictures: int = 72
    retain_pictures: int = 336  # of three seeds together more than a thousand, for FID
    most_steps: int | None = None  # for a quick look: methods that take more stop there, their schedule with them


TUNING = ("cat", "neon style", "blue background")  # what settings are chosen on
SUITES: dict[str, Suite] = {
    "pocket": Suite(methods=METHODS, concepts=("frog", "strawberry", "pencil style", "green background")),
    "pocket-quick": Suite(
        methods=METHODS, concepts=("frog",), seeds=(0,), forget_pictures=36, retain_pictures=168, most_steps=75
    ),
    "pocket-tuning": Suite(methods=METHODS, concepts=TUNING),
    "pocket-ablation": Suite(  # fewer steps and pictures: what is compared is one knob against the base beside it
        methods={"our default": OURS} | {name: BASE | more for name, more in ABLATION.items()},
        concepts=TUNING,
        retain_pictures=240,
        most_steps=120,
    ),
}


class Row(NamedTuple):
    """One method on one concept with one seed."""

    method: str  # as the tables call it
    concept: str  # "frog", "pencil style"
    seed: int
    pictures: tuple[int, int]  # of the concept, and of everything else
    job: tuple[str, ...]  # the main job's options; none for the original model
    config: dict[str, Any]
    key: str

    @property
    def file(self) -> str:
        """Where its result is kept."""
        return f"{slug(self.method.lower())}_{slug(self.concept)}_{self.seed}.json"


def rows(suite: Suite, methods: tuple[str, ...], concepts: tuple[str, ...], seeds: tuple[int, ...]) -> list[Row]:
    """All rows, the first seed of every method and concept before the second; the original model leads each seed.

    Empty tuples stand for all that the suite has. Raises UserError for a method that the suite does not have or that
    nobody has registered, for an unknown concept, and as the methods' knobs do.
    """
    for name in methods:
        if name not in (ORIGINAL, *suite.methods):
            raise UserError(f"--methods {name!r} is not in this suite: it has {', '.join(suite.methods)}")
    chosen = [name for name in suite.methods if not methods or name in methods]
    named = list(dict.fromkeys(concept_of(text) for text in concepts or suite.concepts))
    return [
        row(suite, method, concept, seed)
        for seed in dict.fromkeys(seeds or suite.seeds)
        for method in (ORIGINAL, *chosen)
        for concept in named
    ]


def concept_of(text: str) -> str:
    """The concept as the tables call it: "neon" and "Neon style" are both "neon style"."""
    kind, word = part_named(text)
    return word if kind == "object" else f"{word} {kind}"


def row(suite: Suite, method: str, concept: str, seed: int) -> Row:
    """The row with its key."""
    pictures = suite.forget_pictures, suite.retain_pictures
    if seed >= REFERENCE or 2 * (seed + REFERENCE + 1) * pictures[1] > HALF:
        raise UserError(f"--seeds {seed} is too large: its pictures would be another seed's, give smaller ones")
    asked = {"concept": (concept,), "seed": seed}
    if method == ORIGINAL:
        job, config = (), {"method": ORIGINAL, "concept": concept, "seed": seed}
    else:
        # judged here, not there; a killed run begins anew, so that its time is whole
        values = asked | {"model": "pocket", "eval_forget": 0, "eval_retain": 0, "checkpointing_steps": 1_000_000}
        values = DATA | suite.methods[method] | values
        plan = make(**values)
        if suite.most_steps and "steps" in names(type(plan.method)) and plan.method.steps > suite.most_steps:
            plan = make(**values | {"steps": suite.most_steps})
        job, config = tuple(plan.options()), plan.config()
    return Row(method, concept, seed, pictures, job, config, digest([config, protocol(), pictures]))


@cache
def protocol() -> dict[str, Any]:
    """How rows are judged: model, judge, sampler, and what the distances compare."""
    from erase_sd.pocket.oracle import WEIGHTS
    from erase_sd.pocket.score import GUIDANCE, STEPS
    from eval.models import weights_digest

    return {
        "model_sha256": weights_digest("pocket"),
        "judge_sha256": file_digest(WEIGHTS),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": "DDIM",
        "features": "pocket",  # of eval.extractors: the judge's pooled features
        "reference": "the original model on the same retain prompts with other seeds",
    }


def stored(row: Row, folder: Path) -> dict[str, Any] | None:
    """The result of a row; None if it is missing, or stale: of another key. Raises UserError for a damaged file."""
    file = folder / "rows" / row.file
    if not file.is_file():
        return None
    try:
        result = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run the same command again") from error
    return result if result.get("key") == row.key else None
