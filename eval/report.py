"""Everything in one page: `python -m eval.report runs/a runs/b --images gen/grid/sd gen/grid/a gen/grid/b`.

Writes report.html, one file that opens offline and runs no script, and report.md with its pictures beside it.
"""

from __future__ import annotations

import html
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_sd.common.cli import argument, knob, parse, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import new_folder, write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment

    from eval.reporting.blocks import Section
    from eval.reporting.inputs import ErasureRun, ImageSet

PICTURES = "images"  # folder beside report.md


@dataclass(frozen=True, kw_only=True)
class Report:
    """What to show and where to write it."""

    run: tuple[str, ...] = argument("run folders of erase-sd")
    images: tuple[str, ...] = knob(
        (), "folders of images of eval.generate or eval.grid, the original model's included"
    )
    output_dir: str = knob("report", "folder of report.html and report.md")
    censor: bool = knob(True, "make what is exposed unrecognisable")


def main(argv: list[str] | None = None) -> int:
    """Write the page and say where it is."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Show runs and the images of their models on one page."
    options = Report(**parse(argv, prog="eval.report", description=text, report=Report)["report"])
    from eval.reporting import inputs as evidence

    _check_place(Path(options.output_dir))
    runs = [evidence.run(path) for path in options.run]
    images = evidence.images(options.images, options.censor)
    for path in write(Path(options.output_dir), runs, images, options.censor):
        print(path)
    return 0


def _check_place(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise UserError(f"--output_dir {place} is a file: name a folder")


def write(place: Path, runs: list[ErasureRun], images: list[ImageSet], censored: bool) -> list[Path]:
    """Write the HTML page, then the Markdown and its pictures; returns the paths of the two."""
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
        for picture in (picture for section in content["sections"] for picture in section.pictures):
            (folder / picture.name).write_bytes(picture.data)
    write_atomic(text, _markdown().get_template("page.md.j2").render(content, images=PICTURES) + "\n")
    return [page, text]


def sections(runs: list[ErasureRun], images: list[ImageSet]) -> list[Section]:
    """All sections, in the order of reading: results first, how they came about last."""
    from eval.reporting.blocks import Section
    from eval.reporting.image_sections import exposed, grid, quality, worst
    from eval.reporting.run_sections import plots, protocols, scores
    from eval.reporting.run_sections import record_section as record

    return [
        Section("scores", "Scores", scores(runs)),
        Section("before-after", "Before and after", plots(runs, "before_after", "same prompts, same seeds")),
        Section("grid", "Side by side", grid(runs, images)),
        Section("exposed", "Exposed parts", exposed(images)),
        Section("worst", "Worst remaining images", worst(runs, images)),
        Section("quality", "Quality", quality(runs, images)),
        Section("losses", "Loss curves", plots(runs, "trace", "the repair, step by step")),
        Section("saliency", "Saliency by layer", plots(runs, "saliency", "where the trim re-initialised entries")),
        Section("record", "Run record", record(runs)),
        Section("protocols", "Protocols", protocols(runs, images)),
    ]


def title(runs: list[ErasureRun]) -> str:
    """What was erased from what."""
    concepts = list(dict.fromkeys(run.concept for run in runs))
    models = list(dict.fromkeys(str(run.record["config"].get("model", "a model")) for run in runs))
    return f"{', '.join(concepts)} erased from {', '.join(models)}"


def lead(runs: list[ErasureRun], images: list[ImageSet], censored: bool) -> str:
    """By which method and at what cost, and whether pictures are whole."""
    made = [f"{run.name} by {run.record['config'].get('method', 'an unknown method')}{_cost(run)}" for run in runs]
    hidden = " Exposed regions are pixelated." if any(judged.hidden.note for judged in images) else ""
    return f"{'; '.join(made)}.{hidden if censored else ' Images are not censored.'}"


def _cost(run: ErasureRun) -> str:
    steps, seconds = run.record.get("trace", {}).get("steps"), run.record.get("seconds")
    words = [f"{steps} steps"] if steps else []
    return ", ".join(["", *words, *([f"{seconds / 60:.1f} minutes"] if seconds is not None else [])])


def _html() -> Environment:
    """Every value is escaped as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"), autoescape=True, undefined=StrictUndefined
    )


def _markdown() -> Environment:
    """Every value is made inert in Markdown, but for those that the template says are `raw`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from erase_sd.denoising.card import inert

    def safe(value: object) -> str:
        return value if isinstance(value, Markup) else inert(value)

    loader = FileSystemLoader(Path(__file__).parent / "reporting")
    page = Environment(loader=loader, finalize=safe, undefined=StrictUndefined, keep_trailing_newline=True)
    page.filters["raw"] = Markup
    page.filters["code"] = lambda command: Markup(html.escape(command, quote=False))
    return page


if __name__ == "__main__":
    run_main(main)
