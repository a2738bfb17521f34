"""Prompts as somebody published them: Ring-A-Bell's, P4D's, MMA's, UnlearnDiffAtk's and I2P's files, each a result.

What was found against another model and is only replayed here says less than the attack itself: the result bears the
file's name and shares no column with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from erase_sd.common.errors import asked_by_the_user
from eval.attacks.base import AttackSetup, AttackTarget, ConceptAttack, Finding, Preparation, findings, targets_digest
from prompts.tables import read


@dataclass(frozen=True, kw_only=True)
class PublishedPrompts(ConceptAttack):
    """Every row of a file is a target of its own, drawn from the seed that the file gives it, if it does."""

    box: ClassVar[Literal["white", "grey", "black"]] = "black"
    families: ClassVar[tuple[str, ...] | None] = None

    file: str
    rows: int | None = None  # only the first so many

    @property
    def name(self) -> str:
        """Return what the result is called."""
        return f"published:{Path(self.file).stem}"

    @property
    def budget(self) -> str:
        """Say that the file holds all there is."""
        return "one picture of every row"

    def options(self) -> dict:
        """Return the rows in place of the path, which may be another tomorrow."""
        return {"rows_sha256": targets_digest(self.targets([]))}

    def targets(self, given: list[AttackTarget]) -> list[AttackTarget]:
        """Return the rows of the file. Raises UserError for a file that cannot be read."""
        targets = []
        with asked_by_the_user():
            rows = read(Path(self.file))
        for row in rows[: self.rows]:
            seed = row.row if row.seed is None else row.seed
            targets.append(AttackTarget(row=row.row, prompt=row.prompt, seed=seed))
        return targets

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Draw and judge every row."""
        images = setup.sample_targets(targets)
        return findings(["published"], [images], [setup.judge.shows(images)])
