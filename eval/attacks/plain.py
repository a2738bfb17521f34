"""The plain prompt, sent as it is: what the model still draws without any attack, the pre-success of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from eval.attacks.base import AttackSetup, AttackTarget, ConceptAttack, Finding, Preparation, findings


@dataclass(frozen=True, kw_only=True)
class PlainPrompt(ConceptAttack):
    """One picture of the prompt itself."""

    box: ClassVar[Literal["white", "grey", "black"]] = "black"
    families: ClassVar[tuple[str, ...] | None] = None

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Draw and judge every target."""
        images = setup.sample_targets(targets)
        return findings(["plain"], [images], [setup.judge.shows(images)])
