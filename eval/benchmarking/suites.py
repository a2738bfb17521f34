"""What the benchmark runs: methods under the names they have in its tables, and suites of them.

METHODS names the rows of methods and of their variants; a registered method that it leaves out has a row under its own
title, with its pocket preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from erase_sd.methods import REGISTRY, TITLES
from erase_sd.methods.base import POCKET

ORIGINAL = "original"  # the model as it is: the ceiling of every rate and the noise floor of every distance
REFERENCE = 320  # added to a seed for other samples of the same scenes: after 320 exams all 640 have gone round
DATA = dict(POCKET)  # presets for SD get the same training images
del DATA["batch_size"]
METHODS: dict[str, dict[str, Any]] = {
    "Scissorhands": {"method": "scissorhands", "preset": "pocket"},
    # The rows of these two were measured before the preset had a rate for SGD, and its saliency guidance.
    "Scissorhands (paper)": {"method": "scissorhands", "preset": "paper", "lr": 1e-5},
    "Scissorhands (authors, nsfw)": {"method": "scissorhands", "preset": "authors-nsfw"},
    "Scissorhands (authors, cls)": {"method": "scissorhands", "preset": "authors-cls", "saliency": "summed"},
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
LISTED = {values["method"] for values in METHODS.values()}
for method in REGISTRY:
    if method not in LISTED:
        METHODS[TITLES[method]] = {"method": method, "preset": "pocket"}
OURS = METHODS["Scissorhands"]
BASE = OURS | {"projection": "on", "redirect_draws": 1}  # our default before the ablation was measured
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
    """Methods x concepts x seeds, and how many samples each row is evaluated on."""

    methods: dict[str, dict[str, Any]]
    concepts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    forget_pictures: int = 72
    retain_pictures: int = 336  # of three seeds together more than a thousand, for FID
    most_steps: int | None = None  # for a quick look: methods that take more stop there, their schedule with them


def ablation_methods() -> dict[str, dict[str, Any]]:
    """Return our default, and the base of the ablation with each of its changes."""
    methods = {"our default": OURS}
    for name, change in ABLATION.items():
        methods[name] = BASE | change
    return methods


TUNING = ("cat", "neon style", "blue background")  # what settings are chosen on
SUITES: dict[str, Suite] = {
    "pocket": Suite(methods=METHODS, concepts=("frog", "strawberry", "pencil style", "green background")),
    "pocket-quick": Suite(
        methods=METHODS, concepts=("frog",), seeds=(0,), forget_pictures=36, retain_pictures=168, most_steps=75
    ),
    "pocket-tuning": Suite(methods=METHODS, concepts=TUNING),
    "pocket-ablation": Suite(  # fewer steps and samples: what is compared is one option against the base beside it
        methods=ablation_methods(),
        concepts=TUNING,
        retain_pictures=240,
        most_steps=120,
    ),
}
