"""Attacks on erased models: is the concept gone, or only its word? One attack, one file; `ATTACKS` names them all.

White-box attacks, which see weights, and published prompts, which were found against another model, are names of their
own and never share a column. `plain`, the prompt itself, always runs first: what it draws is pre-success.
"""

from __future__ import annotations

from typing import Any

from eval.attacks.base import ConceptAttack
from eval.attacks.completion import Completion
from eval.attacks.concept_inversion import ConceptInversion
from eval.attacks.image_to_image import ImageToImage
from eval.attacks.inpainting import Inpainting
from eval.attacks.p4d import PromptingForDebugging
from eval.attacks.plain import PlainPrompt
from eval.attacks.relearning import Relearning
from eval.attacks.ring_a_bell import RingABell
from eval.attacks.tina import Tina
from eval.attacks.unlearndiffatk import UnlearnDiffAtk
from eval.attacks.wordings import Wordings

PLAIN = "plain"
ATTACKS: dict[str, type[ConceptAttack]] = {  # published prompts are made from files: eval.attacks.published
    PLAIN: PlainPrompt,
    "wordings": Wordings,
    "ring-a-bell": RingABell,
    "unlearndiffatk": UnlearnDiffAtk,
    "p4d-n": PromptingForDebugging,
    "p4d-k": PromptingForDebugging,
    "concept-inversion": ConceptInversion,
    "tina": Tina,
    "image-to-image": ImageToImage,
    "inpainting": Inpainting,
    "completion": Completion,
    "relearning-1": Relearning,
    "relearning-8": Relearning,
    "relearning-64": Relearning,
}
OWN: dict[str, dict[str, Any]] = {  # what tells the entries of one class apart
    "p4d-k": {"every": 3},
    "relearning-1": {"pictures": 1},
    "relearning-8": {"pictures": 8},
    "relearning-64": {"pictures": 64},
}
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {  # over the classes' defaults, which are the published values
    "published": {},
    "small": {  # enough on the embedded model; a minute of one thread for what searches target by target
        "ring-a-bell": {"population": 60, "generations": 60},
        "unlearndiffatk": {"timesteps": 10, "iterations": 10, "samples": 8},
        "p4d-n": {"steps": 200, "samples": 8, "picture_every": 20},
        "p4d-k": {"steps": 200, "samples": 8, "picture_every": 20},
        "concept-inversion": {"vectors": 4, "pictures": 128, "steps": 250, "lr": 0.02, "word": "something"},
        "tina": {"timesteps": 20, "steps": 10},
    },
}


def attack(name: str, budget: str = "published", given: dict[str, Any] | None = None) -> ConceptAttack:
    """Return the attack of this name with the budget's options and, above them, the given ones."""
    options = OWN.get(name, {}) | BUDGETS[budget].get(name, {}) | (given or {})
    return ATTACKS[name](**options)
