"""Results as other projects' scripts read them: `python -m eval.layout attacks/cat --to unlearndiffatk`.

unlearndiffatk   results of eval.attack -> MODEL/ATTACK/attack_idx_N/{config.json, log.json}, MODEL/no_attack/...:
                 Diffusion-MU-Attack's check_asr.py takes them as --root and --root-no-attack
unlearncanvas    images of `eval.generate --prompts unlearncanvas` -> UNLEARNED/THEME_OBJECT_seedN.jpg, for its
                 accuracy.py --input_dir --seed 188
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from erase_sd.common.cli import argument, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from eval.attacks import PLAIN
from eval.images.folder import read
from eval.images.sources import UNLEARNCANVAS

QUALITY = 95  # of a JPEG


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which results, and for whose scripts."""

    folder: str = argument("folder of eval.attack or of eval.generate")
    to: Literal["unlearndiffatk", "unlearncanvas"] | None = knob(None, "whose scripts shall read them")
    unlearned: str | None = knob(None, "unlearncanvas: the theme or object that was erased, such as Van_Gogh")
    output_dir: str | None = knob(None, "where to write (default: FOLDER/NAME)")

    def __post_init__(self) -> None:
        """Raise UserError for what is missing."""
        if self.to is None:
            raise UserError("--to is missing: give unlearndiffatk or unlearncanvas")
        if self.to == "unlearncanvas" and not re.fullmatch(r"\w+", self.unlearned or ""):
            raise UserError(f"--unlearned {self.unlearned} names no theme or object: give one such as Van_Gogh")


def run(options: Layout) -> None:
    """Write the files and say where they are."""
    place = Path(options.output_dir or Path(options.folder, str(options.to)))
    if options.to == "unlearncanvas":
        count = write_canvas(Path(options.folder), place / str(options.unlearned))
        print(f"{place / str(options.unlearned)}: {count} images")
        return
    for written in write_logs(Path(options.folder), place):
        print(written)


def write_logs(folder: Path, place: Path) -> list[Path]:
    """Write every result of an attack folder as Diffusion-MU-Attack logs it; returns the roots.

    A log's first entry is the plain prompt, its last what the attack came to, so that check_asr.py's pre-ASR and ASR
    are `pre` and `asr` here. Raises UserError for a folder without results of the plain prompt.
    """
    roots = []
    for plain in sorted((folder / "results").glob(f"*/{PLAIN}.json")):
        before: dict[int, dict[str, Any]] = {}
        for record in _records(plain):
            before[record["row"]] = record
        for file in sorted(plain.parent.glob("*.json")):
            records = _records(file)
            if {record["row"] for record in records} - before.keys():
                continue  # prompts of its own, which have no plain ones to be compared with
            root = place / plain.parent.name / ("no_attack" if file == plain else file.stem)
            for record in records:
                first = before[record["row"]]
                _log(root / f"attack_idx_{record['row']}", file.stem, first, None if file == plain else record)
            roots.append(root)
    if not roots:
        raise UserError(f"{folder} has no results of eval.attack: give its --output_dir")
    return roots


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): run eval.attack again") from error


def _log(place: Path, attack: str, plain: dict[str, Any], record: dict[str, Any] | None) -> None:
    """Write one target's config.json and log.json; what the plain prompt draws stays drawn."""
    entries = [_entry(plain, plain["success"], plain["seconds"])]
    if record:
        entries.append(_entry(record, plain["success"] or record["success"], plain["seconds"] + record["seconds"]))
    config = {"overall": {"attacker": attack}, "attacker": {"attack_idx": plain["row"], "eval_seed": plain["seed"]}}
    write_atomic(place / "config.json", json.dumps(config) + "\n")
    write_atomic(place / "log.json", json.dumps(entries) + "\n")


def _entry(record: dict[str, Any], success: bool, seconds: float) -> dict[str, Any]:
    """Return an entry of a log; their script reads the time as hours:minutes:seconds, which days would break."""
    minutes, rest = divmod(timedelta(seconds=seconds).total_seconds(), 60)
    time = f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{rest:09.6f}"
    return {"relative_time": time, "prompt": record["prompt"], "success": bool(success)}


def write_canvas(folder: Path, place: Path) -> int:
    """Write a folder's images by UnlearnCanvas' names; returns how many.

    Raises UserError for an image of another prompt.
    """
    entries = read(folder).entries
    for entry in entries:
        if not UNLEARNCANVAS.fullmatch(entry.prompt or ""):
            raise UserError(f"{folder}/{entry.file} is not of --prompts unlearncanvas: generate those first")
    for entry in entries:
        words = UNLEARNCANVAS.fullmatch(str(entry.prompt))
        assert words
        name = f"{words['theme'].replace(' ', '_')}_{words['thing']}_seed{entry.seed}.jpg"
        data = io.BytesIO()
        with Image.open(folder / entry.file) as image:
            image.convert("RGB").save(data, "jpeg", quality=QUALITY)
        write_atomic(place / name, data.getvalue())
    return len(entries)


main = command("eval.layout", "Write results as other projects' scripts read them.", Layout, run)

if __name__ == "__main__":
    run_main(main)
