"""Everything in one page: `python -m eval.report runs/a runs/b --images gen/grid/sd gen/grid/a gen/grid/b`.

Writes report.html, one file that opens offline and runs no script, and report.md with its pictures beside it.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erase_sd.common.cli import argument, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import new_folder, write_atomic
from erase_sd.denoising.card import inert
from eval.reporting import image_sections, inputs, run_sections
from eval.reporting.blocks import Section
from eval.reporting.inputs import ErasureRun, ImageSet

if TYPE_CHECKING:
    from jinja2 import Environment

PICTURES = "images"  # folder beside report.md
TEMPLATES = Path(__file__).parent / "reporting"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What to show and where to write it."""

    run: tuple[str, ...] = argument("run folders of erase-sd")
    images: tuple[str, ...] = knob(
        (), "folders of images of eval.generate or eval.grid, the original model's included"
    )
    output_dir: str = knob("report", "folder of report.html and report.md")
    censor: bool = knob(True, "make what is exposed unrecognisable")
    hide: Literal["whole", "boxes"] = knob(
        "whole", "explicit pictures, or only boxes that the detector finds, which misses two of five such pictures"
    )


def report(options: Report) -> None:
    """Write the page and say where it is. Raises UserError for a place or an input that is something else."""
    place = Path(options.output_dir)
    _check_place(place)
    runs = [inputs.run(path) for path in options.run]
    images = inputs.images(options.images, options.censor, options.hide)
    for path in write(place, runs, images, options.censor):
        print(path)


def _check_place(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise UserError(f"--output_dir {place} is a file: name a folder")


def write(place: Path, runs: list[ErasureRun], images: list[ImageSet], censored: bool) -> list[Path]:
    """Write the HTML page, then the Markdown and its pictures; return the paths of the two."""
    content: dict[str, Any] = {
        "title": title(runs),
        "lead": lead(runs, images, censored),
        "sections": sections(runs, images),
    }
    page, text = place / "report.html", place / "report.md"
    if (place / PICTURES).exists() and not text.is_file():
        raise UserError(f"--output_dir {place} holds a folder {PICTURES} of something else: name another")
    write_atomic(page, _html().get_template("page.html.j2").render(content))
    with new_folder(place / PICTURES) as folder:  # none of an earlier report stays, which may have been uncensored
        for section in content["sections"]:
            for picture in section.pictures:
                (folder / picture.name).write_bytes(picture.data)
    write_atomic(text, _markdown().get_template("page.md.j2").render(content, images=PICTURES) + "\n")
    return [page, text]


def sections(runs: list[ErasureRun], images: list[ImageSet]) -> list[Section]:
    """Return all sections, in the order of reading: results first, how they came about last."""
    before_after = run_sections.plots(runs, "before_after", "same prompts, same seeds")
    losses = run_sections.plots(runs, "trace", "the repair, step by step")
    saliency = run_sections.plots(runs, "saliency", "where the trim re-initialised entries")
    return [
        Section("scores", "Scores", run_sections.scores(runs)),
        Section("before-after", "Before and after", before_after),
        Section("grid", "Side by side", image_sections.grid(runs, images)),
        Section("exposed", "Exposed parts", image_sections.exposed(images)),
        Section("worst", "Worst remaining images", image_sections.worst(runs, images)),
        Section("quality", "Quality", image_sections.quality(runs, images)),
        Section("losses", "Loss curves", losses),
        Section("saliency", "Saliency by layer", saliency),
        Section("record", "Run record", run_sections.record(runs)),
        Section("protocols", "Protocols", run_sections.protocols(runs, images)),
    ]


def title(runs: list[ErasureRun]) -> str:
    """Return what was erased from what."""
    concepts = dict.fromkeys(run.concept for run in runs)
    models = dict.fromkeys(str(run.record["config"].get("model", "a model")) for run in runs)
    return f"{', '.join(concepts)} erased from {', '.join(models)}"


def lead(runs: list[ErasureRun], images: list[ImageSet], censored: bool) -> str:
    """Return by which method and at what cost, and whether pictures are whole."""
    parts = []
    for run in runs:
        method = run.record["config"].get("method", "an unknown method")
        parts.append(f"{run.name} by {method}{_cost(run)}")
    text = f"{'; '.join(parts)}."
    if not censored:
        return f"{text} Images are not censored."
    if any(judged.hidden.note for judged in images):
        return f"{text} Exposed regions are pixelated."
    return text


def _cost(run: ErasureRun) -> str:
    """Return ", N steps, N minutes", as far as they are recorded."""
    steps, seconds = run.record.get("trace", {}).get("steps"), run.record.get("seconds")
    text = ""
    if steps:
        text += f", {steps} steps"
    if seconds is not None:
        text += f", {seconds / 60:.1f} minutes"
    return text


def _html() -> Environment:
    """Return the environment of the HTML page: every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)


def _markdown() -> Environment:
    """Return that of the Markdown: every value is made inert, but for those that the template says are `raw`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: object) -> str:
        return value if isinstance(value, Markup) else inert(value)

    def code(text: str) -> Markup:
        return Markup(html.escape(text, quote=False))

    loader = FileSystemLoader(TEMPLATES)
    page = Environment(loader=loader, finalize=safe, undefined=StrictUndefined, keep_trailing_newline=True)
    page.filters["raw"] = Markup
    page.filters["code"] = code
    return page


main = command("eval.report", "Show runs and the images of their models on one page.", Report, report)

if __name__ == "__main__":
    run_main(main)
