"""The pocket world's judge on folders: `python -m eval.concepts gen/erased --concept cat --baseline gen/pocket`.

The rates are UnlearnCanvas's (Zhang et al., arXiv:2402.11846), in [0, 1], higher is better:

    UA    1 - accuracy of the erased concept on the prompts that ask for it: is it forgotten?
    IRA   accuracy of its kind on the prompts without it: are the other objects still drawn?
    CRA   accuracy of the other kinds on all prompts, its own included: are styles and backgrounds still drawn?

What a prompt asks for is read back from its sentence. A broken image shows nothing, which is wrong in IRA and CRA; it
does not count as forgotten in UA either. The judge's "other", a picture of nothing it knows, does: see `other_share`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from erase_sd.common.cli import argument, at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest, write_atomic
from erase_sd.pocket.world import Part, part_named

if TYPE_CHECKING:
    from eval.images.folder import ImageFolder
    from eval.judges.oracle import Judged


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What to look at and what was erased."""

    folder: tuple[str, ...] = argument("folders of images that eval.generate drew with the pocket model's prompts")
    concept: tuple[str, ...] = knob((), 'what was erased, as the pocket model calls it: cat "neon style"')
    baseline: str | None = knob(None, "folder of the original model's images, to give the rates before")
    batch_size: int = knob(256, "images in a batch")

    def __post_init__(self) -> None:
        """Raise UserError without a concept."""
        at_least(self, 1, "batch_size")
        if not self.concept:
            raise UserError("--concept is missing: name what was erased, such as --concept cat")


def judge(options: Concepts) -> int:
    """Write concepts.json of every folder; returns 1 where too many images are broken, the baseline's included.

    Raises UserError for a concept or a prompt that the pocket world does not have, and where no prompt asks for it.
    """
    from eval.images.folder import read
    from eval.judges.oracle import judged, scenes

    parts = list(dict.fromkeys(part_named(text) for text in options.concept))
    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    asked = [scenes(folder, parts) for folder in [*folders, *([baseline] if baseline else [])]]
    before = judged(baseline, asked[-1], options.batch_size) if baseline else None
    ruined = _ruined(baseline, before) if baseline else False
    for folder, wanted in zip(folders, asked[: len(folders)], strict=True):
        after = judged(folder, wanted, options.batch_size)
        ruined |= _ruined(folder, after)
        result = _result(after, before, parts) | {"protocol": _protocol(options, after, before)}
        write_atomic(folder.path / "concepts.json", json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result))
    return int(ruined)


def _result(after: Judged, before: Judged | None, parts: list[Part]) -> dict[str, Any]:
    """concepts.json, but for its protocol."""
    from erase_sd.pocket.oracle import OTHER
    from eval.judges.oracle import rates

    images = list(zip(after.scenes, after.answers, strict=True))
    shown = [a[kind] for kind, word in parts for s, a in images if getattr(s, kind) == word]
    return {
        "concepts": [list(part) for part in parts],
        **rates(after, parts),
        "other_share": sum(word == OTHER for word in shown) / len(shown),
        "n": len(after.entries),
        "broken": sum(bool(entry.broken) for entry in after.entries),
        "values": {entry.file: answer for entry, answer in zip(after.entries, after.answers, strict=True)},
        "before": rates(before, parts) if before else None,
    }


def _protocol(options: Concepts, after: Judged, before: Judged | None) -> dict[str, Any]:
    from erase_sd.pocket.oracle import WEIGHTS

    return {
        "judge": "erase_sd/pocket/oracle.safetensors",
        "judge_sha256": file_digest(WEIGHTS),
        "rates": "UnlearnCanvas, arXiv:2402.11846; a prompt without the concept names none of the concepts",
        "unit": "share of answers; ci95 is Wilson's over images",
        "broken": "counted against UA, IRA and CRA",
        "baseline": options.baseline,
        "images": after.images,
        "baseline_images": before and before.images,
    }


def _ruined(folder: ImageFolder, seen: Judged) -> bool:
    """Whether so many images are broken that the rates must not look like a success; then it is said."""
    from eval.images.folder import too_many_broken

    if ruined := too_many_broken(seen.entries):
        count = sum(bool(entry.broken) for entry in seen.entries)
        print(
            f"{count} of {len(seen.entries)} images of {folder.path} are broken: do not trust these rates",
            file=sys.stderr,
        )
    return ruined


def table(title: str, result: dict[str, Any]) -> str:
    """The rates as text, with those before."""
    names = ", ".join(f"{kind} {word}" for kind, word in result["concepts"])
    lines = [f"{title}: {names}; {result['n']} images, {result['broken']} of them broken"]
    for name in ("UA", "IRA", "CRA"):
        now, then = result[name], result["before"] and result["before"][name]["value"]
        value = "not measured" if now["value"] is None else f"{now['value']:.3f}  95 % {now['ci95'][0]:.3f} to "
        value += "" if now["value"] is None else f"{now['ci95'][1]:.3f}, n {now['n']}"
        lines.append(f"{name:6}{value}" + (f", before {then:.3f}" if then is not None else ""))
    lines.append(
        f"other {result['other_share']:.3f} of the answers on the concept's prompts are nothing the judge knows"
    )
    return "\n".join(lines) + "\n"


main = command(
    "eval.concepts",
    "Measure on pocket images whether the concept is gone and everything else is there.",
    Concepts,
    judge,
)

if __name__ == "__main__":
    run_main(main)
