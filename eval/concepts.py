"""The pocket world's oracle on folders: `python -m eval.concepts gen/erased --concept cat --baseline gen/pocket`.

The rates are UnlearnCanvas's (Zhang et al., arXiv:2402.11846), in [0, 1], higher is better:

    UA    1 - accuracy of the erased concept on the prompts that ask for it: is it forgotten?
    IRA   accuracy of its kind on the prompts without it: are the other objects still there?
    CRA   accuracy of the other kinds on all prompts, its own included: are styles and backgrounds still there?

What a prompt asks for is read back from its sentence. A broken image shows nothing, which is wrong in IRA and CRA; it
does not count as forgotten in UA either. The oracle's "other", an image of nothing it knows, does: see `other_share`.

For real models --judge says who looks, such as CLIP, and --others which things of the same kind are to stay:

    python -m eval.concepts gen/erased --concept cat --others dog horse --judge clip:openai/clip-vit-large-patch14

UA is then of the prompts that name the concept, IRA of those that name one of the others; there is no CRA.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from erase_sd.common.cli import argument, at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest, write_atomic
from erase_sd.pocket.oracle import OTHER, WEIGHTS
from erase_sd.pocket.world import Part, part_named
from eval.images.folder import count_broken, read, warn_if_broken
from eval.judges.naming import JUDGES, asked, kept_and_gone, named_in, naming
from eval.judges.oracle import RATES, Judged, judged, rate, rates, scenes


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What to look at and what was erased."""

    folder: tuple[str, ...] = argument("folders of images that eval.generate made of the pocket model's prompts")
    concept: tuple[str, ...] = knob((), 'what was erased, as the pocket model calls it: cat "neon style"')
    baseline: str | None = knob(None, "folder of the original model's images, to give the rates before")
    judge: str = knob("pocket", f"who looks: {JUDGES}")
    others: tuple[str, ...] = knob((), "things of the same kind that are to stay, as prompts call them")
    batch_size: int = knob(256, "images in a batch")

    def __post_init__(self) -> None:
        """Raise UserError without a concept, and for more or less than a judge of any concept can tell apart."""
        at_least(self, 1, "batch_size")
        if not self.concept:
            raise UserError("--concept is missing: name what was erased, such as --concept cat")
        if self.judge == "pocket" and not self.others:
            return
        if not self.others:
            raise UserError(f"--judge {self.judge} has nothing to tell the concept from: name --others dog horse")
        if len(self.concept) > 1 or self.concept[0] in self.others:
            raise UserError("--others stay beside one --concept: name one, and not among the others")


def judge(options: Concepts) -> int:
    """Write concepts.json of every folder; returns 1 where too many images are broken, the baseline's included.

    Raises UserError for a concept or a prompt that the pocket world does not have, and where no prompt asks for it.
    """
    if options.others:
        return _named(options)
    parts = list(dict.fromkeys(part_named(text) for text in options.concept))
    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    wanted = [scenes(folder, parts) for folder in folders]  # refuses bad prompts before anything is computed
    before = None
    any_broken = False
    if baseline:
        before = judged(baseline, scenes(baseline, parts), options.batch_size)
        any_broken = warn_if_broken(before.entries, baseline.path)
    for folder, of_prompts in zip(folders, wanted, strict=True):
        after = judged(folder, of_prompts, options.batch_size)
        any_broken |= warn_if_broken(after.entries, folder.path)
        result = _result(after, before, parts) | {"protocol": _protocol(options, after, before)}
        write_atomic(folder.path / "concepts.json", json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result))
    return int(any_broken)


def _named(options: Concepts) -> int:
    """Do the same by a judge that tells the concept from the others."""
    things = (*options.concept, *options.others)
    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    for folder in [*folders, *([baseline] if baseline else [])]:
        if not any(asked(entry.prompt, things) == things[0] for entry in folder.entries):
            raise UserError(f"no prompt of {folder.path} asks for {things[0]}: add prompts that do")
    judge_of_all = naming(options.judge, things, options.batch_size)
    before = None
    any_broken = False
    if baseline:
        entries, answers = named_in(baseline, judge_of_all, options.batch_size)
        before = kept_and_gone(entries, answers, things) | {"CRA": rate([])}
        any_broken = warn_if_broken(entries, baseline.path)
    for folder in folders:
        entries, answers = named_in(folder, judge_of_all, options.batch_size)
        any_broken |= warn_if_broken(entries, folder.path)
        of_concept = []
        for entry, answer in zip(entries, answers, strict=True):
            if asked(entry.prompt, things) == things[0]:
                of_concept.append(answer)
        result = {
            "concepts": [["thing", things[0]]],
            **kept_and_gone(entries, answers, things),
            "CRA": rate([]),
            "other_share": of_concept.count(None) / len(of_concept),
            "n": len(entries),
            "broken": count_broken(entries),
            "values": {e.file: {"thing": answer or OTHER} for e, answer in zip(entries, answers, strict=True)},
            "before": before,
            "protocol": {"judge": judge_of_all.name, "judge_sha256": judge_of_all.key, "others": list(options.others)},
        }
        write_atomic(folder.path / "concepts.json", json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result))
    return int(any_broken)


def _result(after: Judged, before: Judged | None, parts: list[Part]) -> dict[str, Any]:
    """Return concepts.json without its protocol."""
    values = {}
    for entry, answer in zip(after.entries, after.answers, strict=True):
        values[entry.file] = answer
    return {
        "concepts": [list(part) for part in parts],
        **rates(after, parts),
        "other_share": _other_share(after, parts),
        "n": len(after.entries),
        "broken": count_broken(after.entries),
        "values": values,
        "before": rates(before, parts) if before else None,
    }


def _other_share(after: Judged, parts: list[Part]) -> float:
    """Return the share of "other" among the answers of a concept's kind on the prompts that ask for it."""
    shown = []
    for kind, word in parts:
        for scene, answer in zip(after.scenes, after.answers, strict=True):
            if getattr(scene, kind) == word:
                shown.append(answer[kind])
    return shown.count(OTHER) / len(shown)


def _protocol(options: Concepts, after: Judged, before: Judged | None) -> dict[str, Any]:
    return {
        "judge": "erase_sd/pocket/oracle.safetensors",
        "judge_sha256": file_digest(WEIGHTS),
        "rates": "UnlearnCanvas, arXiv:2402.11846; a prompt without the concept names none of the concepts",
        "unit": "share of answers; ci95 is Wilson's over images",
        "broken": "counted against UA, IRA and CRA",
        "baseline": options.baseline,
        "images": after.images,
        "baseline_images": before.images if before else None,
    }


def table(title: str, result: dict[str, Any]) -> str:
    """Return the rates as text, with those before."""
    concepts = ", ".join(f"{kind} {word}" for kind, word in result["concepts"])
    lines = [f"{title}: {concepts}; {result['n']} images, {result['broken']} of them broken"]
    for name in RATES:
        rate = result[name]
        line = f"{name:6}"
        if rate["value"] is None:
            line += "not measured"
        else:
            low, high = rate["ci95"]
            line += f"{rate['value']:.3f}  95 % {low:.3f} to {high:.3f}, n {rate['n']}"
        before = result["before"][name]["value"] if result["before"] else None
        if before is not None:
            line += f", before {before:.3f}"
        lines.append(line)
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
