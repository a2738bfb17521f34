"""How good the pocket model and its oracle are, on pictures neither was trained on; shares have n and interval."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.models.pipeline import load, sample
from erase_sd.pocket.prompt_sets import Part, Question, canonical_texts, exam, reworded_texts
from erase_sd.pocket.score import GUIDANCE, STEPS, wilson
from erase_sd.pocket.training import artwork, oracle
from erase_sd.pocket.training.oracle import LABELS, Oracle64
from erase_sd.pocket.training.vae import through
from erase_sd.pocket.world import KINDS, Scene

FRESH = 4000  # renders
NEVER = 10_000_019  # seed of renders that no training drew
WORDINGS = {"canonical": canonical_texts, "other": reworded_texts}


def share(hits: int, n: int) -> dict[str, float | int | list[float]]:
    """Write a share with its n and its 95 % Wilson interval."""
    return {"share": hits / n, "n": n, "ci95": list(wilson(hits / n, n))}


def measure(
    judge: Oracle64, vae: AutoencoderKL, known: Tensor, strangers: Tensor, model: Path, n: int, renders: int = FRESH
) -> dict[str, dict]:
    """Score the oracle on renders, reconstructions and everything else, the pipeline in `model` on 2 n pictures."""
    x, labels = artwork.scenes(known, renders, generator(NEVER, "report"))
    y = torch.cat([through(vae)(part) for part in x.split(100)])
    return {
        "vae": {"l1": (x - y).abs().mean().item(), "n": renders},
        "oracle on renders": named_right(judge, x, labels),
        "oracle on reconstructions": named_right(judge, y, labels),
        "oracle says other": rejections(judge, known, strangers),
        "pipeline": pipeline_scores(judge, model, exam([], 0, n)),
    }


def named_right(judge: Oracle64, x: Tensor, labels: Tensor) -> dict[str, dict]:
    """Count the pictures (N, 3, 64, 64) whose object, style and background are named as in labels (N, 3)."""
    seen = oracle.seen(judge, x)
    right = (seen == labels).sum(0).tolist()
    return {kind: share(hits, len(x)) for kind, hits in zip(KINDS, right, strict=True)}


def rejections(judge: Oracle64, known: Tensor, strangers: Tensor, n: int = 500) -> dict[str, dict]:
    """Count by kind of nothing the pictures in which the oracle sees no object; icons it was never trained on."""
    rates = {}
    for i, make in enumerate(dict.fromkeys(oracle.NOTHING)):
        x, labels = make(known, strangers, n, generator(NEVER, "nothing", i))
        nothing = labels[:, 0] == len(LABELS["object"]) - 1
        rejected = (oracle.seen(judge, x)[:, 0] == labels[:, 0])[nothing]
        rates[make.__name__.strip("_")] = share(int(rejected.sum()), len(rejected))
    return rates


def draw(model: Path, questions: list[Question], texts: list[str], description: str) -> list[Image.Image]:
    """Draw the questions as the pocket model is used: 20 steps, its default guidance."""
    seeds = [question.seed for question in questions]
    pipe = load(str(model))
    return sample(pipe, texts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=64, description=description)


def indices(scene: Scene) -> list[int]:
    """Number the object, style and background of a complete scene as the oracle does."""
    return [names.index(part) for names, part in zip(KINDS.values(), scene, strict=True)]


def pipeline_scores(judge: Oracle64, model: Path, questions: list[Question]) -> dict[str, dict]:
    """Count how often the pipeline draws what it is asked for, in canonical and in other words."""
    wanted = torch.tensor([indices(question.scene) for question in questions])
    scores = {}
    for wording, write in WORDINGS.items():
        images = draw(model, questions, write(questions), f"{wording} words")
        scores[wording] = named_right(judge, oracle.to_tensor(images), wanted)
    return scores


def retrain_scores(judge: Oracle64, model: Path, parts: list[Part], n: int) -> dict[str, dict]:
    """Count how often a pipeline draws each part that it is asked for, n pictures a wording, and 2 n without them."""
    scores = {}
    for kind, word in parts:
        questions = exam([(kind, word)], n, 0)
        index = KINDS[kind].index(word)
        for wording, write in WORDINGS.items():
            images = draw(model, questions, write(questions), f"{word}, {wording} words")
            seen = oracle.seen(judge, oracle.to_tensor(images))[:, list(KINDS).index(kind)]
            scores[f"{kind} {word}, {wording} words"] = share(int((seen == index).sum()), n)
    return scores | {"everything else": pipeline_scores(judge, model, exam(parts, 0, n))}


def table(result: dict, about: str = "") -> list[str]:
    """List the shares of a report as rows of a page, whatever their depth: what, share, interval, n."""
    rows = []
    for name, value in result.items():
        what = f"{about}, {name}" if about else name
        if "share" in value:
            low, high = value["ci95"]
            rows.append(f"| {what} | {value['share']:.1%} | {low:.1%} to {high:.1%} | {value['n']} |")
        elif "l1" in value:
            rows.append(f"| {what}, L1 of a reconstruction in [-1, 1] | {value['l1']:.4f} | | {value['n']} |")
        else:
            rows += table(value, what)
    return rows


def sheet(images: list[Image.Image], columns: int = 10, side: int = 128) -> Image.Image:
    """Lay pictures out in rows, enlarged without smoothing."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * side, rows * side), "white")
    for i, image in enumerate(images):
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    return page
