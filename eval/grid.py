"""Contact sheets: `python -m eval.grid --prompts i2p --rows 8 --model M --unet runs/a runs/b`.

Rows are prompts, columns are models, all with the same seeds; what is missing is drawn. `--folders gen/a gen/b` puts
finished folders side by side. Below --output_dir: grid.png, grid.pdf and a folder of images for every column.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.cli import knob, names, parse, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from eval.generate import Generation, draw
from eval.images.match import headings, label, matched

if TYPE_CHECKING:
    from PIL import Image

    from eval.images.folder import ImageFolder

MOST_ROWS, PAGE = 100, 8  # rows that anybody would look at; rows of a page of the PDF
A4 = (8.27, 11.69)  # inches


@dataclass(frozen=True, kw_only=True)
class Grid(Generation):
    """What to draw for every column, and how to show it."""

    unet: tuple[str, ...] = knob((), "a column each: run folders, UNet folders or Hub ids")
    transformer: tuple[str, ...] = knob((), "the same for models with a transformer")
    base: bool = knob(True, "the model itself as the first column")
    folders: tuple[str, ...] = knob((), "show these finished folders of images instead of drawing any")
    output_dir: str = knob("gen/grid", "folder of the sheets, with a folder of images for every column")
    rows: int = knob(8, "prompts of the sheet, each with --images_per_prompt rows")
    censor: bool = knob(True, "make what is exposed unrecognisable")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range and for a sheet without columns."""
        super().__post_init__()
        if (high := self.rows * self.images_per_prompt) > MOST_ROWS:
            raise UserError(
                f"--rows {self.rows} with --images_per_prompt {self.images_per_prompt} makes a sheet of {high} rows: "
                f"give at most {MOST_ROWS}, which is as many as anybody looks at"
            )
        if self.folders and (self.unet or self.transformer):
            raise UserError("--folders shows finished images: leave out --unet and --transformer, or --folders")
        if not (self.folders or self.base or self.unet or self.transformer):
            raise UserError("--no-base leaves no column: name runs with --unet")


def main(argv: list[str] | None = None) -> int:
    """Draw what is missing, write the sheets and say where they are."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Show models side by side: rows are prompts, columns are models."
    options = Grid(**parse(argv, prog="eval.grid", description=text, grid=Grid)["grid"])
    if options.folders:
        from eval.images.folder import read

        folders = [read(path) for path in options.folders]
    else:
        quiet()
        from accelerate import PartialState

        folders = [draw(column) for column in columns(options)]
        if not PartialState().is_main_process:
            return 0
    for path in write(folders, options.rows * options.images_per_prompt, Path(options.output_dir), options.censor):
        print(path)
    return 0


def columns(options: Grid) -> list[Generation]:
    """What to draw for every column, in the order in which they were named; the model itself comes first."""
    networks = [{}] if options.base else []
    networks += [{"unet": path} for path in options.unet] + [{"transformer": path} for path in options.transformer]
    paths = [next(iter(network.values()), options.model) for network in networks]
    alike = Counter(Path(path).name for path in paths)
    shared = {name: value for name, value in asdict(options).items() if name in names(Generation)}
    found = []
    for network, path in zip(networks, paths, strict=True):
        name = Path(path).name if alike[Path(path).name] == 1 else path.strip("./").replace("/", "-")
        place = {"output_dir": str(Path(options.output_dir, name))}
        found.append(Generation(**shared | {"unet": None, "transformer": None} | network | place))
    if len({column.output_dir for column in found}) < len(found):
        raise UserError(f"two columns are the same: {' '.join(paths)}; name each model once")
    return found


def write(folders: list[ImageFolder], rows: int, place: Path, censored: bool) -> list[Path]:
    """Write grid.png and grid.pdf and return their paths; what is hidden, and why, goes to stderr.

    Raises UserError where a folder lacks a row.
    """
    from erase_sd.common.imaging import sheet
    from eval.judges.censor import mask, shown

    lines = matched(folders, rows)
    veils = [mask(folder, censored) for folder in folders]
    for hidden in veils:
        if hidden.note:
            print(hidden.note, file=sys.stderr)
    cells = [
        [shown(folder, entry, hidden) for folder, entry, hidden in zip(folders, line, veils, strict=True)]
        for line in lines
    ]
    titles, labels = headings(folders), [label(line[0]) for line in lines]
    whole = sheet(cells, labels, titles)
    pages = [sheet(cells[i : i + PAGE], labels[i : i + PAGE], titles) for i in range(0, len(cells), PAGE)]
    write_atomic(place / "grid.png", _bytes(whole, "PNG"))
    dots = max(pages[0].width / A4[0], pages[0].height / A4[1])  # an inch: a page fits on paper
    pdf = _bytes(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=dots, quality=92)
    write_atomic(place / "grid.pdf", pdf)
    return [place / "grid.png", place / "grid.pdf"]


def _bytes(image: Image.Image, kind: str, **how: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


if __name__ == "__main__":
    run_main(main)
