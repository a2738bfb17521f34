"""The sections of a report, as data: tables, pictures and sentences, which a template turns into HTML or Markdown.

A section without data says in one sentence which command makes it.
"""

from __future__ import annotations

import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from eval.censoring import shown
from eval.evidence import Images, Run
from eval.figures import Picture, picture, stored
from eval.grid import brief, matched
from eval.images import Entry

ROWS = 8  # of a grid
RATES = {  # of scores.json: how a rate is called, and which way is the better one
    "concept": ("prompts with the concept: it is seen", "lower"),
    "retain": ("other prompts: the right {} is seen", "higher"),
    "spared": ("prompts with the concept: the right {} is seen", "higher"),
}


class Note(NamedTuple):
    """A sentence, and the command that it speaks of."""

    text: str
    command: str = ""
    kind: str = "note"


class Table(NamedTuple):
    """Columns after the first `words` hold numbers."""

    head: list[str]
    rows: list[list[str]]
    words: int = 1
    caption: str = ""
    kind: str = "table"


class Gallery(NamedTuple):
    """Pictures, one after the other."""

    pictures: list[Picture]
    caption: str = ""
    kind: str = "gallery"


class Sheet(NamedTuple):
    """Rows are prompts, columns are models: (prompt, seed, pictures)."""

    head: list[str]
    rows: list[tuple[str, str, list[Picture]]]
    caption: str = ""
    kind: str = "sheet"


Block = Note | Table | Gallery | Sheet


class Section(NamedTuple):
    """A title and what stands below it; `key` is its anchor."""

    key: str
    title: str
    blocks: list[Block]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in the order of reading."""
        found: list[Picture] = []
        for block in self.blocks:
            if isinstance(block, Gallery):
                found += block.pictures
            elif isinstance(block, Sheet):
                found += [picture for row in block.rows for picture in row[-1]]
        return found


def scores(runs: list[Run]) -> list[Block]:
    """What the run itself measured, before and after."""
    rows = [[run.name, *row] for run in runs if run.scores for row in _rates(run.scores)]
    blocks: list[Block] = []
    if rows:
        alone = len(runs) == 1
        head = ["run", "share of images", "better", "before, %", "after, %", "after, 95 % interval"]
        caption = "; ".join(dict.fromkeys(_counts(run) for run in runs if run.scores))
        blocks.append(Table(head[alone:], [row[alone:] for row in rows], 3 - alone, caption))
    missing = [run for run in runs if not run.scores]
    return blocks + [
        Note(f"{run.name} was not judged: draw its images, then judge them.", draw(run)) for run in missing
    ]


def _rates(found: dict[str, Any]) -> list[list[str]]:
    """[rate, better, before, after, interval] of everything in scores.json that has a before and an after."""
    rows = []
    for group, (words, better) in RATES.items():
        rates, intervals = found.get(group, {}), found.get("ci95", {}).get(group, {})
        kinds = {"": rates} if group == "concept" else rates
        for kind, rate in kinds.items():
            low, high = (intervals if group == "concept" else intervals.get(kind, {})).get("after", (None, None))
            interval = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
            if {"before", "after"} <= rate.keys():
                shares = [_share(rate["before"]), _share(rate["after"])]
                rows.append([words.format(kind), better, *shares, interval])
    return rows


def _share(rate: float | None) -> str:
    return "not measured" if rate is None else f"{100 * rate:.1f}"


def _counts(run: Run) -> str:
    n, other = run.scores.get("n", {}), run.scores.get("concept", {}).get("other_share")
    text = f"{n.get('forget', '?')} images of the concept, {n.get('retain', '?')} of other prompts"
    return text if other is None else f"{text}; {100 * other:.1f} % of the former show nothing that the judge knows"


def draw(run: Run) -> str:
    """The command that draws a run's images beside the original model's."""
    model = str(run.record["config"].get("model"))
    source = "pocket" if model == "pocket" else "i2p"
    return shlex.join(["python", "-m", "eval.grid", "--prompts", source, "--model", model, "--unet", str(run.path)])


def plots(runs: list[Run], name: str, words: str) -> list[Block]:
    """A picture that every run writes, in its own file."""
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        file = run.path / f"{name}.png"
        if file.is_file():
            alt = f"{run.name}: {name.replace('_', ' ')}, {words}"
            blocks.append(Gallery([stored(file, f"{name}-{number}", alt, f"{run.name}: {words}")]))
            continue
        config = run.record["config"]
        command = ["erase-sd", "--model", str(config.get("model")), "--concept", run.concept]
        command += ["--method", str(config.get("method")), "--output_dir", str(run.path)]
        text = f"{run.name} has no {file.name}: a run with steps and a trim writes it when it finishes."
        blocks.append(Note(text, shlex.join(command)))
    return blocks


def grid(runs: list[Run], images: list[Images]) -> list[Block]:
    """A contact sheet for every source of prompts, the original model first."""
    if not images:
        text = "No images were given: draw them, then give the folders below gen/grid to this report with --images."
        return [Note(text, draw(runs[0]))]
    blocks: list[Block] = []
    for number, (source, group) in enumerate(groupby(sorted(images, key=_order), key=lambda judged: judged.source)):
        columns = list(group)
        lines = matched([judged.folder for judged in columns], ROWS)
        rows = []
        for line in lines:
            pairs = enumerate(zip(columns, line, strict=True))
            cells = [cell(judged, entry, f"grid-{number}-{column}") for column, (judged, entry) in pairs]
            rows.append((brief(line[0]), f"seed {line[0].seed}", cells))
        notes = [f"The first {len(rows)} images of {source}", *(x.hidden.note for x in columns if x.hidden.note)]
        blocks.append(Sheet([judged.label for judged in columns], rows, "; ".join(notes)))
    return blocks


def _order(judged: Images) -> tuple[str, bool]:
    return judged.source, not judged.is_baseline


def cell(judged: Images, entry: Entry, name: str, caption: str = "") -> Picture:
    """One image of a folder as it may be seen; `name` tells the folder from others."""
    alt = f"{judged.label}: {brief(entry)}"
    file = re.sub(r"[^\w-]", "", Path(entry.file).stem)
    return picture(f"{name}-{file}", shown(judged.folder, entry, judged.hidden), alt, caption)
