"""Sections about folders of images: side by side, counts, quality, the worst of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from erase_sd.common.errors import UserError
from eval.images.folder import Entry, explicit
from eval.images.match import brief, shared
from eval.judges.censor import shown
from eval.judges.detections import DETECTIONS
from eval.judges.detections import stored as detections
from eval.judges.protocols import EXPOSED, caution, network_of
from eval.reporting.blocks import Block, Gallery, Note, Picture, Sheet, Table, picture
from eval.reporting.figure import PROTOCOL, Panel, fig3, panel, part_name, percent
from eval.reporting.inputs import ErasureRun, ImageSet
from eval.reporting.run_sections import grid_command

ROWS = 8  # of a grid
SOURCES = {"nudity": "the 1K set", "i2p": "I2P"}
AMOUNT = {  # the paper's sampler; and what makes four prompts a thousand images
    "nudity": " --images_per_prompt 250 --scheduler lms",
    "i2p": " --scheduler lms",
}
WORST = 6  # images of a folder


def grid(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """Return a contact sheet for every source of prompts, the original model first."""
    if not images:
        text = "No images were given: draw them, then give the folders below gen/grid to this report with --images."
        return [Note(text, grid_command(runs[0]))]
    by_source: dict[str, list[ImageSet]] = {}
    for judged in sorted(images, key=_order):
        by_source.setdefault(judged.source, []).append(judged)
    blocks: list[Block] = []
    for number, (source, columns) in enumerate(by_source.items()):
        rows = []
        lines, words = _worth_seeing(runs, columns)
        for line in lines:
            cells = []
            for column, (judged, entry) in enumerate(zip(columns, line, strict=True)):
                cells.append(cell(judged, entry, f"grid-{number}-{column}"))
            rows.append((brief(line[0]), f"seed {line[0].seed}", cells))
        notes = [f"{source}: {words}"]
        for judged in columns:
            if judged.hidden.note:
                notes.append(judged.hidden.note)
        blocks.append(Sheet([judged.label for judged in columns], rows, "; ".join(notes)))
    return blocks


def _worth_seeing(runs: list[ErasureRun], columns: list[ImageSet]) -> tuple[list[list[Entry]], str]:
    """Return images of all columns, half that ask for what was erased and half that do not, and that in words.

    Of either half the worst come first: those that show most of the concept, and those that moved furthest.
    """
    asked, rest, sensitive = [], [], explicit(columns[0].folder)
    for line in shared([judged.folder for judged in columns]):
        group = asked if line[0].file in sensitive or _asks(line[0], runs, columns[0].source) else rest
        group.append(line)
    remaining = [_found(judged) for judged in columns]
    moved = [_moved(judged) for judged in columns]
    asked.sort(key=lambda line: -_highest(line, remaining))
    rest.sort(key=lambda line: -_highest(line, moved))
    of_concept = min(len(asked), max(ROWS // 2, ROWS - len(rest)))
    of_rest = min(len(rest), ROWS - of_concept)
    if not asked:
        return rest[:ROWS], f"the first {of_rest} images, none of which asks for what was erased"
    words = f"{of_concept} images of the concept, what shows most of it first"
    if any(moved):
        words += f", and {of_rest} of the rest, what moved furthest first"
    else:
        words += f", and the first {of_rest} of the rest"
    return asked[:of_concept] + rest[:of_rest], words


def _asks(entry: Entry, runs: list[ErasureRun], source: str) -> bool:
    """Tell whether an image's prompt asks for what a run erased: by its words, or because all of its source do."""
    if entry.prompt is None:
        return True
    for run in runs:
        for concept in run.concept.split(", "):
            if concept == source or re.search(rf"\b{re.escape(concept)}s?\b", entry.prompt, re.IGNORECASE):
                return True
    return False


def _found(judged: ImageSet) -> dict[str, float]:
    """Return {file: how much of the concept a judge sees} of an erased model; {} for the original and the unjudged."""
    if judged.is_baseline:
        return {}
    if judged.concepts is not None:
        seen = _seen(judged.concepts)
    elif (judged.folder.path / DETECTIONS).is_file():
        seen = _scored(judged)
    else:
        return {}
    return {file: score for file, (score, _) in seen.items()}


def _moved(judged: ImageSet) -> dict[str, float]:
    """Return {file: drift} where eval.quality measured it."""
    metrics = judged.quality["metrics"] if judged.quality else []
    for metric in metrics:
        if metric["name"] == "drift":
            return dict(zip(metric["protocol"]["files"], metric["values"], strict=True))
    return {}


def _highest(line: list[Entry], scores: list[dict[str, float]]) -> float:
    """Return the highest score of a line's images, 0 where there is none."""
    return max(table.get(entry.file, 0.0) for entry, table in zip(line, scores, strict=True))


def _order(judged: ImageSet) -> tuple[str, bool]:
    return judged.source, not judged.is_baseline


def cell(judged: ImageSet, entry: Entry, name: str, caption: str = "") -> Picture:
    """Return one image of a folder as it may be seen; `name` tells the folder from others."""
    alt = f"{judged.label}: {brief(entry)}"
    file = re.sub(r"[^\w-]", "", Path(entry.file).stem)
    return picture(f"{name}-{file}", shown(judged.folder, entry, judged.hidden), alt, caption)


def exposed(images: list[ImageSet]) -> list[Block]:
    """Return both panels of the paper's Fig. 3, with their numbers."""
    blocks, missing = [], []
    for source, title in SOURCES.items():
        of_source = [judged for judged in images if judged.source == source]
        if of_source:
            blocks += _panel(source, title, of_source)
        else:
            missing.append(source)
    if missing:
        blocks.append(_without(missing))
    return blocks


def _without(sources: list[str]) -> Note:
    """Return how images of these sources are made."""
    titles, commands = [], []
    for source in sources:
        titles.append(f"{SOURCES[source]} (--prompts {source})")
        commands.append(f"python -m eval.generate --prompts {source}{AMOUNT[source]} --output_dir gen/{source}")
    text = f"No images of {' and '.join(titles)} were given: draw them with the original model and with --unet RUN, "
    text += "count them with python -m eval.nudity and name them with --images."
    return Note(text, "\n".join(commands))


def _panel(source: str, title: str, images: list[ImageSet]) -> list[Block]:
    """Return the panel of one source, or what is missing for it."""
    if not all(judged.nudity and PROTOCOL in judged.nudity["protocols"] for judged in images):
        paths = [str(judged.folder.path) for judged in images]
        text = f"{title}: not all folders were counted by the protocol {PROTOCOL}."
        return [Note(text, shlex.join(["python", "-m", "eval.nudity", *paths, "--protocol", PROTOCOL]))]
    baselines, models = [], []
    for judged in images:
        group = baselines if judged.is_baseline else models
        group.append(judged)
    if len(baselines) > 1:
        paths = " and ".join(str(judged.folder.path) for judged in baselines)
        text = f"{paths} are both of an original model: give one, all changes are relative to it"
        raise UserError(f"{text}; a pipeline that was made from another is drawn with --original")
    if not (baselines and models):
        kind = "an erased model" if baselines else "the original model"
        more = " --unet RUN" if baselines else ""
        text = f"{title}: a change needs the images of {kind} as well: draw and judge them, then name them with "
        text += "--images."
        command = f"python -m eval.generate --prompts {source}{AMOUNT[source]}{more} --output_dir gen/{source}-more"
        return [Note(text, command)]
    numbers = panel(baselines[0], models)
    warning = caution([PROTOCOL], network_of(baselines[0].nudity["detector"]["sha256"]))
    table = _counts_table(baselines[0].label, numbers, warning)
    return [Gallery([fig3(f"fig3-{source}", title, numbers)]), table]


def _counts_table(original: str, numbers: Panel, warning: str | None) -> Table:
    """Return the panel's counts and changes, a row a part; a warning says that the network is not the paper's."""
    head = ["part", original]
    for model in numbers.after:
        head += [model, "change"]
    rows = []
    for part, before in numbers.before.items():
        row = [part_name(part), str(before)]
        for model, counts in numbers.after.items():
            row += [str(counts[part]), percent(numbers.change[model][part])]
        rows.append(row)
    text = f"{numbers.unit}, as the protocol {PROTOCOL} counts them"
    return Table(head, rows, 1, f"{text}; {warning}" if warning else text)


def worst(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """Return the images of erased models that show most of what was to be forgotten."""
    models = [judged for judged in images if not judged.is_baseline]
    if not models:
        text = "No images of an erased model were given: draw them, judge them and name them with --images."
        return [Note(text, grid_command(runs[0]))]
    blocks = []
    for number, judged in enumerate(models):
        blocks.append(_worst_of(judged, f"worst-{number}"))
    return blocks


def _worst_of(judged: ImageSet, name: str) -> Block:
    """Return one folder's worst images, or the command that evaluates it."""
    if judged.concepts is not None:
        found, words = _seen(judged.concepts), "in which the judge still sees the concept"
    elif (judged.folder.path / DETECTIONS).is_file():
        found, words = _scored(judged), "on which the detector sees an exposed part at all, highest score first"
    else:
        path = shlex.quote(str(judged.folder.path))
        command = f"python -m eval.nudity {path}"
        if judged.source == "pocket":
            command = f"python -m eval.concepts {path} --concept CONCEPT"
        return Note(f"{judged.name}: nobody judged its images.", command)
    entries = [entry for entry in judged.folder.entries if entry.file in found]
    entries.sort(key=lambda entry: -found[entry.file][0])
    text = f"{judged.name}: {len(entries)} of {len(judged.folder.entries)} images {words}"
    pictures = []
    for entry in entries[:WORST]:
        _, what = found[entry.file]
        caption = f"{what}: {brief(entry, 60)}"
        if entry.seed is not None:
            caption += f", seed {entry.seed}"
        pictures.append(cell(judged, entry, name, caption))
    return Gallery(pictures, text) if pictures else Note(f"{text}.")


def _seen(concepts: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {file: (1, what is seen)} of the images that show a concept."""
    found = {}
    for file, answer in concepts["values"].items():
        words = []
        for kind, word in concepts["concepts"]:
            if answer.get(kind) == word:
                words.append(f"{word} ({kind})")
        if words:
            found[file] = (1.0, f"sees {', '.join(words)}")
    return found


def _scored(judged: ImageSet) -> dict[str, tuple[float, str]]:
    """Return {file: (score, part and score)} of the highest exposed part of every image that has one."""
    found = {}
    for record in detections(judged.folder.path / DETECTIONS):
        parts = []
        for box in record["detections"]:
            if box["class"] in EXPOSED:
                parts.append((box["score"], box["class"]))
        if parts:
            score, part = max(parts)
            found[record["file"]] = (score, f"{part_name(part)} {score:.2f}")
    return found


def quality(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """Return what was kept, metric by metric, and the oracle's rates."""
    if not images:
        text = "No images were given: draw them, measure them with python -m eval.quality and name them with --images."
        return [Note(text, grid_command(runs[0]))]
    metrics, broken, rates = [], [], []
    for judged in images:
        if judged.quality:
            for metric in judged.quality["metrics"]:
                metrics.append([judged.name, *_metric(metric)])
                if warning := metric.get("protocol", {}).get("warning"):
                    broken.append(f"{judged.name}: {warning}")
            broken.append(f"{judged.name}: {judged.quality['broken']} of {judged.quality['n']} images broken")
        if judged.concepts:
            rates.append([judged.name, *_concepts(judged.concepts)])
    blocks: list[Block] = []
    if metrics:
        head = ["images", "metric", "features", "against", "better", "value", "n"]
        blocks.append(Table(head, metrics, 5, "; ".join(broken)))
    if rates:
        caption = (
            "UA: share of the concept's prompts on which it is gone; IRA: accuracy of its kind on the other prompts; "
        )
        caption += "CRA: of the other kinds on all prompts; in brackets the 95 % interval. Higher is better."
        blocks.append(Table(["images", "concept", "UA", "IRA", "CRA", "broken"], rates, 2, caption))
    return blocks + _unmeasured(images, bool(blocks))


def _unmeasured(images: list[ImageSet], others: bool) -> list[Block]:
    """Return the command that measures what was not; the original model is what the `others` were compared with."""
    command, names = ["python", "-m", "eval.quality"], []
    for judged in images:
        is_reference = judged.is_baseline and others
        if not (judged.quality or judged.concepts or is_reference):
            command.append(str(judged.folder.path))
            names.append(judged.name)
    if not names:
        return []
    text = f"{', '.join(names)}: not measured; --baseline names what to compare with."
    return [Note(text, shlex.join(command))]


def _metric(entry: dict[str, Any]) -> list[str]:
    """Return the cells of a metric: name, features, against, better, value, n."""
    counts = entry["n"] if isinstance(entry["n"], list) else [entry["n"]]
    value = "undefined" if entry["value"] is None else f"{entry['value']:.4g} {entry['unit'] or ''}".strip()
    better = "higher" if entry["higher_is_better"] else "lower"
    against = entry["against"] or "its prompts"
    title = entry.get("title", entry["name"])  # written by earlier versions: without a title
    n = " and ".join("unknown" if count is None else str(count) for count in counts)
    return [title, entry["features"] or "", against, better, value, n]


def _concepts(found: dict[str, Any]) -> list[str]:
    """Return the cells of the oracle's rates: concepts, UA, IRA, CRA, broken."""
    cells = [", ".join(f"{word} ({kind})" for kind, word in found["concepts"])]
    for name in ("UA", "IRA", "CRA"):
        rate = found[name]
        low, high = rate["ci95"]
        cells.append("not measured" if rate["value"] is None else f"{rate['value']:.3f} ({low:.3f} to {high:.3f})")
    cells.append(f"{found['broken']} of {found['n']}")
    return cells
