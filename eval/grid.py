"""Contact sheets: `python -m eval.grid --prompts i2p --rows 8 --model M --unet runs/a runs/b`.

Rows are prompts, columns are models, all with the same seeds; what is missing is drawn. `--folders gen/a gen/b` puts
finished folders side by side. Below --output_dir: grid.png, grid.pdf and a folder of images for every column.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.options import knob, names, parse
from erase_sd.process import UserError, run_main
from erase_sd.runtime import write_atomic
from erase_sd.terminal import quiet
from eval.generate import Generation, draw

if TYPE_CHECKING:
    from PIL import Image

    from eval.images import Entry, ImageFolder

MOST_ROWS, PAGE = 100, 8  # rows that anybody would look at; rows of a page of the PDF
A4 = (8.27, 11.69)  # inches
PROMPT, LINE = 110, 26  # letters of a prompt, letters of a line: the sheet is for looking at images


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
        from eval.images import read

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
    from erase_sd.pictures import sheet
    from eval.censoring import shown, veil

    lines = matched(folders, rows)
    veils = [veil(folder, censored) for folder in folders]
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


def matched(folders: list[ImageFolder], rows: int | None) -> list[list[Entry]]:
    """The first `rows` images of the first folder, each with its counterparts: same row, same seed, same prompt.

    Images that no manifest lists are matched by their files' names. Raises UserError naming what one folder lacks.
    """
    tables = [{_key(entry): entry for entry in folder.entries} for folder in folders]
    lines = []
    for entry in folders[0].entries[:rows]:
        line = [table.get(_key(entry)) for table in tables]
        for folder, other in zip(folders, line, strict=True):
            if other is None:
                raise UserError(f"{folder.path} lacks {_words(entry)}, which {folders[0].path} has: generate it")
            if other.prompt != entry.prompt:
                raise UserError(f"{_words(entry)} is another prompt in {folder.path} than in {folders[0].path}")
        lines.append(line)
    return lines


def _key(entry: Entry) -> tuple:
    return (entry.file,) if entry.row is None else (entry.row, entry.seed)


def _words(entry: Entry) -> str:
    return entry.file if entry.row is None else f"row {entry.row} with seed {entry.seed}"


def headings(folders: list[ImageFolder]) -> list[str]:
    """The folders' labels; where two are the same, the paths tell them apart."""
    count = Counter(folder.label for folder in folders)
    return [folder.label if count[folder.label] == 1 else str(folder.path) for folder in folders]


def brief(entry: Entry, letters: int = PROMPT) -> str:
    """An image's prompt in one line of at most so many letters, said to be empty where it is; else the file's name."""
    if entry.prompt is None:
        return entry.file
    text = " ".join(entry.prompt.split())
    return f"{text[: letters - 1]}…" if len(text) > letters else text or "(empty prompt)"


def label(entry: Entry) -> str:
    """What stands beside a row: the prompt, shortened and wrapped, and the seed; else the file's name."""
    if entry.prompt is None:
        return entry.file
    return f"{textwrap.fill(brief(entry), LINE)}\nseed {entry.seed}"


if __name__ == "__main__":
    run_main(main)
