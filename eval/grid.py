"""Contact sheets: `python -m eval.grid --prompts i2p --rows 8 --model M --unet runs/a runs/b`.

Rows are prompts, columns are models, all with the same seeds; images that are missing are sampled. `--folders gen/a
gen/b` puts finished folders side by side. Below --output_dir: grid.png, grid.pdf and a folder of images for every
column.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from PIL import Image

from erase_sd.common.cli import command, knob, names, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from erase_sd.common.imaging import sheet
from eval.generate import Generation, generate
from eval.images.folder import ImageFolder, read
from eval.images.match import headings, label, matched
from eval.judges.censor import Hiding, mask, shown

MOST_ROWS, PAGE = 100, 8  # rows that anybody would look at; rows of a page of the PDF
A4 = (8.27, 11.69)  # inches
COLUMNS = ("unet", "transformer", "text_encoder", "adapter", "models")  # options whose values are a column each
NOTHING = {"unet": None, "transformer": None, "text_encoder": None, "adapter": ()}


@dataclass(frozen=True, kw_only=True)
class Grid(Generation):
    """What to sample for every column, and how to show it."""

    unet: tuple[str, ...] = knob((), "a column each: run folders, UNet folders, Hub ids or single files")
    transformer: tuple[str, ...] = knob((), "the same for models with a transformer")
    text_encoder: tuple[str, ...] = knob((), "a column each: folders or files of text encoders")
    adapter: tuple[str, ...] = knob((), "a column each: LoRA or SPM files, FILE or FILE@0.5")
    models: tuple[str, ...] = knob((), "a column each: whole models that were made from --model")
    base: bool = knob(True, "the model itself as the first column")
    folders: tuple[str, ...] = knob((), "show these finished folders of images instead of sampling any")
    output_dir: str = knob("gen/grid", "folder of the sheets, with a folder of images for every column")
    rows: int = knob(8, "prompts of the sheet, each with --images_per_prompt rows")
    censor: bool = knob(True, "make what is exposed unrecognisable")
    hide: Literal["whole", "boxes"] = knob(
        "whole", "explicit pictures, or only boxes that the detector finds, which misses two of five such pictures"
    )

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range and for a sheet without columns."""
        super().__post_init__()
        high = self.rows * self.images_per_prompt
        if high > MOST_ROWS:
            raise UserError(
                f"--rows {self.rows} with --images_per_prompt {self.images_per_prompt} makes a sheet of {high} rows: "
                f"give at most {MOST_ROWS}, which is as many as anybody looks at"
            )
        asked = [name for name in COLUMNS if getattr(self, name)]
        if self.folders and asked:
            raise UserError(f"--folders shows finished images: leave out --{asked[0]}, or --folders")
        if not (self.folders or self.base or asked):
            raise UserError("--no-base leaves no column: name runs with --unet")


def run(options: Grid) -> None:
    """Sample what is missing, write the sheets and say where they are."""
    if options.folders:
        folders = [read(path) for path in options.folders]
    else:
        folders = [generate(column) for column in columns(options)]
        if not PartialState().is_main_process:
            return
    rows, place = options.rows * options.images_per_prompt, Path(options.output_dir)
    for path in write(folders, rows, place, options.censor, options.hide):
        print(path)


def columns(options: Grid) -> list[Generation]:
    """Return what to sample for every column, in the order in which they were named; the model itself comes first.

    Raises UserError where two columns are the same.
    """
    networks: list[dict[str, Any]] = [{}] if options.base else []
    paths = [options.model] if options.base else []
    for option in COLUMNS:
        for path in getattr(options, option):
            networks.append(_column(option, path, options.model))
            paths.append(path)
    same_name = Counter(Path(path).name for path in paths)
    values = asdict(options)
    shared = {name: values[name] for name in names(Generation)}
    found: dict[str, Generation] = {}
    for network, path in zip(networks, paths, strict=True):
        name = Path(path).name
        if same_name[name] > 1:
            name = path.strip("./").replace("/", "-")
        folder = str(Path(options.output_dir, name))
        if folder in found:
            raise UserError(f"two columns are the same: {' '.join(paths)}; name each model once")
        found[folder] = Generation(**shared | NOTHING | {"output_dir": folder} | network)
    return list(found.values())


def _column(option: str, path: str, model: str) -> dict[str, Any]:
    """Return the options of eval.generate for a column."""
    if option == "models":
        return {"model": path, "original": model}
    return {option: (path,) if option == "adapter" else path}


def write(folders: list[ImageFolder], rows: int, place: Path, censored: bool, hide: Hiding = "whole") -> list[Path]:
    """Write grid.png and grid.pdf and return their paths; what is hidden, and why, goes to stderr.

    Raises UserError where a folder lacks a row.
    """
    lines = matched(folders, rows)
    masks = [mask(folder, censored, hide) for folder in folders]
    for hidden in masks:
        if hidden.note:
            print(hidden.note, file=sys.stderr)
    cells = []
    for line in lines:
        cells.append([shown(*cell) for cell in zip(folders, line, masks, strict=True)])
    titles = headings(folders)
    labels = [label(line[0]) for line in lines]
    pages = []
    for start in range(0, len(cells), PAGE):
        pages.append(sheet(cells[start : start + PAGE], labels[start : start + PAGE], titles))
    write_atomic(place / "grid.png", _bytes(sheet(cells, labels, titles), "PNG"))
    dots = max(pages[0].width / A4[0], pages[0].height / A4[1])  # an inch: a page fits on paper
    pdf = _bytes(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=dots, quality=92)
    write_atomic(place / "grid.pdf", pdf)
    return [place / "grid.png", place / "grid.pdf"]


def _bytes(image: Image.Image, kind: str, **how: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


main = command("eval.grid", "Show models side by side: rows are prompts, columns are models.", Grid, run)

if __name__ == "__main__":
    run_main(main)
