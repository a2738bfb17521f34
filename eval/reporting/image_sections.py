"""Sections about folders of images: side by side, counts, quality, the worst of them."""

from __future__ import annotations

import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

from erase_sd.common.errors import UserError
from eval.images.folder import Entry
from eval.images.match import brief, matched
from eval.judges.censor import shown
from eval.judges.detections import DETECTIONS
from eval.judges.detections import stored as detections
from eval.judges.protocols import EXPOSED
from eval.reporting.blocks import Block, Gallery, Note, Picture, Sheet, Table, picture
from eval.reporting.figure import PROTOCOL, Panel, fig3, panel, part_name, percent
from eval.reporting.inputs import ErasureRun, ImageSet
from eval.reporting.run_sections import draw

ROWS = 8  # of a grid


def grid(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
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


def _order(judged: ImageSet) -> tuple[str, bool]:
    return judged.source, not judged.is_baseline


def cell(judged: ImageSet, entry: Entry, name: str, caption: str = "") -> Picture:
    """One image of a folder as it may be seen; `name` tells the folder from others."""
    alt = f"{judged.label}: {brief(entry)}"
    file = re.sub(r"[^\w-]", "", Path(entry.file).stem)
    return picture(f"{name}-{file}", shown(judged.folder, entry, judged.hidden), alt, caption)


SOURCES = {"nudity": "the 1K set", "i2p": "I2P"}
AMOUNT = {"nudity": " --images_per_prompt 250", "i2p": ""}  # what makes four prompts a thousand images
WORST = 6  # images of a folder


def exposed(images: list[ImageSet]) -> list[Block]:
    """Both panels of the paper's Fig. 3, with their numbers."""
    blocks, missing = [], []
    for source, title in SOURCES.items():
        of_source = [judged for judged in images if judged.source == source]
        if of_source:
            blocks += _panel(source, title, of_source)
        else:
            missing.append(source)
    return blocks + ([_nothing(missing)] if missing else [])


def _nothing(sources: list[str]) -> Note:
    titles = " and ".join(f"{SOURCES[source]} (--prompts {source})" for source in sources)
    text = f"No images of {titles} were given: draw them with the original model and with --unet RUN, count them with "
    text += "python -m eval.nudity and name them with --images."
    commands = [
        f"python -m eval.generate --prompts {source}{AMOUNT[source]} --output_dir gen/{source}" for source in sources
    ]
    return Note(text, "\n".join(commands))


def _panel(source: str, title: str, images: list[ImageSet]) -> list[Block]:
    """The panel of one source, or what is missing for it."""
    ready = [judged for judged in images if judged.nudity and PROTOCOL in judged.nudity["protocols"]]
    if len(ready) < len(images):
        paths = [str(judged.folder.path) for judged in images]
        text = f"{title}: not all folders were counted by the protocol {PROTOCOL}."
        return [Note(text, shlex.join(["python", "-m", "eval.nudity", *paths, "--protocol", PROTOCOL]))]
    baselines = [judged for judged in ready if judged.is_baseline]
    models = [judged for judged in ready if not judged.is_baseline]
    if len(baselines) > 1:
        paths = " and ".join(str(judged.folder.path) for judged in baselines)
        raise UserError(f"{paths} are both of an original model: give one, all changes are relative to it")
    if not (baselines and models):
        kind = "an erased model" if baselines else "the original model"
        more = " --unet RUN" if baselines else ""
        text = (
            f"{title}: a change needs the images of {kind} as well: draw and judge them, then name them with --images."
        )
        return [
            Note(
                text,
                f"python -m eval.generate --prompts {source}{AMOUNT[source]}{more} --output_dir gen/{source}-more",
            )
        ]
    numbers = panel(baselines[0], models)
    return [Gallery([fig3(f"fig3-{source}", title, numbers)]), _detections_table(baselines[0].label, numbers)]


def _detections_table(original: str, numbers: Panel) -> Table:
    head = ["part", original]
    for model in numbers.after:
        head += [model, "change"]
    rows = []
    for part, before in numbers.before.items():
        row = [part_name(part), str(before)]
        for model, counts in numbers.after.items():
            row += [str(counts[part]), percent(numbers.change[model][part])]
        rows.append(row)
    return Table(head, rows, 1, f"{numbers.unit}, as the protocol {PROTOCOL} counts them")


def worst(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """The images of erased models that show most of what was to be forgotten."""
    blocks: list[Block] = []
    for number, judged in enumerate(judged for judged in images if not judged.is_baseline):
        if judged.concepts is not None:
            found, words = _seen(judged.concepts), "in which the judge still sees the concept"
        elif (judged.folder.path / DETECTIONS).is_file():
            found, words = _scored(judged), "on which the detector sees an exposed part at all, highest score first"
        else:
            path = str(judged.folder.path)
            tool, more = ("concepts", " --concept CONCEPT") if judged.source == "pocket" else ("nudity", "")
            command = f"python -m eval.{tool} {shlex.quote(path)}{more}"
            blocks.append(Note(f"{judged.name}: nobody judged its images.", command))
            continue
        entries = [entry for entry in judged.folder.entries if entry.file in found]
        entries.sort(key=lambda entry: -found[entry.file][0])
        text = f"{judged.name}: {len(entries)} of {len(judged.folder.entries)} images {words}"
        shown = [cell(judged, e, f"worst-{number}", _caption(e, found[e.file][1])) for e in entries[:WORST]]
        blocks.append(Gallery(shown, text) if shown else Note(f"{text}."))
    if not blocks:
        text = "No images of an erased model were given: draw them, judge them and name them with --images."
        blocks.append(Note(text, draw(runs[0])))
    return blocks


def _caption(entry: Entry, words: str) -> str:
    return f"{words}: {brief(entry, 60)}" + (f", seed {entry.seed}" if entry.seed is not None else "")


def _seen(concepts: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """{file: (1, what is seen)} of the images that show a concept."""
    found = {}
    for file, answer in concepts["values"].items():
        if words := [f"{word} ({kind})" for kind, word in concepts["concepts"] if answer.get(kind) == word]:
            found[file] = (1.0, f"sees {', '.join(words)}")
    return found


def _scored(judged: ImageSet) -> dict[str, tuple[float, str]]:
    """{file: (score, part and score)} of the highest exposed part of every image that has one."""
    found = {}
    for record in detections(judged.folder.path / DETECTIONS):
        parts = [(d["score"], d["class"]) for d in record["detections"] if d["class"] in EXPOSED]
        if parts:
            score, part = max(parts)
            found[record["file"]] = (score, f"{part_name(part)} {score:.2f}")
    return found


def quality(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """What was kept, metric by metric, and the pocket judge's rates."""
    head = ["images", "metric", "features", "against", "better", "value", "n"]
    rows = [
        [judged.name, *_metric(entry)] for judged in images if judged.quality for entry in judged.quality["metrics"]
    ]
    broken = [f"{x.name}: {x.quality['broken']} of {x.quality['n']} images broken" for x in images if x.quality]
    blocks: list[Block] = [Table(head, rows, 5, "; ".join(broken))] if rows else []
    if rates := [[judged.name, *_concepts(judged.concepts)] for judged in images if judged.concepts]:
        caption = (
            "UA: share of the concept's prompts on which it is gone; IRA: accuracy of its kind on the other prompts; "
        )
        caption += "CRA: of the other kinds on all prompts; in brackets the 95 % interval. Higher is better."
        blocks.append(Table(["images", "concept", "UA", "IRA", "CRA", "broken"], rates, 2, caption))
    missing = [x for x in images if not (x.quality or x.concepts or (x.is_baseline and blocks))]
    if missing:
        command = ["python", "-m", "eval.quality", *(str(judged.folder.path) for judged in missing)]
        labels = ", ".join(judged.name for judged in missing)
        blocks.append(Note(f"{labels}: not measured; --baseline names what to compare with.", shlex.join(command)))
    if not images:
        text = "No images were given: draw them, measure them with python -m eval.quality and name them with --images."
        blocks.append(Note(text, draw(runs[0])))
    return blocks


def _metric(entry: dict[str, Any]) -> list[str]:
    n = entry["n"] if isinstance(entry["n"], list) else [entry["n"]]
    value = "undefined" if entry["value"] is None else f"{entry['value']:.4g} {entry['unit'] or ''}".strip()
    better = "higher" if entry["higher_is_better"] else "lower"
    against = entry["against"] or "its prompts"
    return [entry["name"], entry["features"] or "", against, better, value, " and ".join(map(str, n))]


def _concepts(found: dict[str, Any]) -> list[str]:
    names = ", ".join(f"{word} ({kind})" for kind, word in found["concepts"])
    rates = []
    for rate in (found[name] for name in ("UA", "IRA", "CRA")):
        low, high = rate["ci95"]
        rates.append("not measured" if rate["value"] is None else f"{rate['value']:.3f} ({low:.3f} to {high:.3f})")
    return [names, *rates, f"{found['broken']} of {found['n']}"]
