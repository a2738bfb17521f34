"""Where prompts come from, I2P, COCO, other files, concepts, the pocket world, and the images each row asks for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from erase_sd.common.errors import UserError, asked_by_the_user
from erase_sd.common.files import digest
from erase_sd.pocket.world import caption, grid
from prompts import concepts
from prompts.tables import PromptRow, is_i2p, of_concept, read_file

UNLEARNCANVAS = re.compile(r"A (?P<thing>\w+) image in (?P<theme>[\w ]+) style\.")
THEMES = (  # of UnlearnCanvas (Zhang et al., NeurIPS 2024, arXiv 2402.11846), in the order of its scripts
    "Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon "
    "Cubism Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love "
    "Greenfield Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines "
    "On_Fire Pastel Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Seed_Images Sketch Sponge_Dabbed Structuralism "
    "Superstring Surrealism Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter"
)
OBJECTS = (
    "Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits "
    "Sandwiches Sea Statues Towers Trees Waterfalls"
)
I2P = ("AIML-TUDA/i2p", "i2p_benchmark.csv")  # Hub data set and its file


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows, a short name for tables, the hash of everything the rows say, and what their reader tells the user."""

    name: str
    rows: list[PromptRow]
    notices: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Return the hash of what is asked for: the same rows give the same, wherever they were read from."""
        content = []
        for row in self.rows:
            content.append([row.row, row.prompt, row.seed, row.guidance, row.width, row.height])
        return digest(content)


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to sample."""

    row: PromptRow
    seed: int
    after: int = 0  # images that its generator has drawn noise for before

    @property
    def file(self) -> str:
        """Return its name, of row and noise alone: prompts hold slashes, dots and more than a file name takes."""
        place = f"-{self.after}" if self.after else ""
        return f"{self.row.row:05d}_{self.seed}{place}.png"


def resolve(name: str, column: str | None = None) -> Source:
    """Return the source of this name: "i2p" from the Hub, "pocket", a .csv or .txt file, else a concept.

    `column` names the prompts' column of a .csv. Raises UserError for a file that cannot be read, for a column that is
    not there, and when the Hub cannot be reached.
    """
    with asked_by_the_user():
        return _read(name, column)


def _read(name: str, column: str | None) -> Source:
    """Read the source from its file or concept. Raises ValueError with a sentence for the user where that fails."""
    if name == "i2p":
        found = read_file(_from_hub(), column)
        return Source(name="i2p", rows=found.rows, notices=found.notices)
    path = Path(name)
    if path.suffix.lower() in (".csv", ".txt"):
        found = read_file(path, column)
        return Source(name="i2p" if is_i2p(found.rows) else path.stem, rows=found.rows, notices=found.notices)
    if column is not None:
        raise UserError(f"--prompt_column {column!r} is for a .csv, and --prompts {name} has no columns: leave it out")
    if name in BUILT_IN:
        return Source(name=name, rows=BUILT_IN[name]())
    if path.is_dir() or ("/" in name and path.suffix.lower() != ".json"):
        raise UserError(f"--prompts {name} is no .csv or .txt file, and no concept: give one of these")
    concept = concepts.load(name)
    return Source(name=concept.name, rows=of_concept(concept))


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, file = I2P
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"--prompts i2p: {repo} cannot be had from the Hugging Face Hub ({str(error).splitlines()[0]}): "
            f"download {file} once and give its path instead"
        ) from error


def _pocket() -> list[PromptRow]:
    """Return all 640 complete scenes, shuffled so that any first part of them is spread over the combinations."""
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)  # the order of all published folders
    return [PromptRow(row=i, prompt=caption(scene), seed=i) for i, scene in enumerate(scenes)]


def _unlearncanvas() -> list[PromptRow]:
    """Return UnlearnCanvas' prompt of every theme and object, with the seed that its scripts look for."""
    rows = []
    for theme in THEMES.split():
        for thing in OBJECTS.split():
            prompt = f"A {thing} image in {theme.replace('_', ' ')} style."
            rows.append(PromptRow(row=len(rows), prompt=prompt, seed=188))
    return rows


BUILT_IN = {"pocket": _pocket, "unlearncanvas": _unlearncanvas}


def pictures(rows: list[PromptRow], per_prompt: int, seed: int, running: bool = False) -> Iterator[ImageRequest]:
    """Yield every image of every row.

    A row's first image has the row's own seed; further ones, and rows without a seed, derive theirs from what
    identifies them, so that no count and no order changes an image. With a `running` generator all images of a row
    have its seed, and each takes the noise after that of those before it.
    """
    for row in rows:
        first = _derived(seed, row.row, 0) if row.seed is None else row.seed
        for i in range(per_prompt):
            if running:
                yield ImageRequest(row=row, seed=first, after=i)
            else:
                yield ImageRequest(row=row, seed=first if i == 0 else _derived(first, row.row, i))


def _derived(seed: int, row: int, i: int) -> int:
    """Return 32 bits, which is what torch keeps of a CPU generator's seed."""
    return int(digest([seed, row, i])[:8], 16)


def batches(requests: list[ImageRequest], size: int) -> list[list[ImageRequest]]:
    """Return batches of at most `size` images of one guidance and size.

    They follow from the positions in the list alone: neither what is done already nor the number of processes moves an
    image into other company, which would change its last bits.
    """
    groups: dict[tuple, list[ImageRequest]] = {}
    for request in requests:
        row = request.row
        groups.setdefault((row.guidance, row.width, row.height), []).append(request)
    found = []
    for group in groups.values():
        for start in range(0, len(group), size):
            found.append(group[start : start + size])
    return found


def settled(row: PromptRow, guidance: float, size: int | None, per_row: bool) -> PromptRow:
    """Return the row with the guidance and size that it is sampled with; None leaves the size to the model.

    `per_row` follows the source where it says something (SPM's protocol); otherwise all rows are sampled alike.
    Raises UserError for a size that no VAE can decode.
    """
    for side in (row.width, row.height):
        if per_row and side is not None and side % 8:
            raise UserError(f"row {row.row} of the prompts: a side of {side} pixels is no multiple of 8: correct it")
    if not per_row:
        return replace(row, guidance=guidance, width=size, height=size)
    return replace(
        row,
        guidance=guidance if row.guidance is None else row.guidance,
        width=row.width or size,
        height=row.height or size,
    )
