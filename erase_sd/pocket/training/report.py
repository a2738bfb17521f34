"""How good the pocket model and its judge are, on pictures neither was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.models.pipeline import load, sample
from erase_sd.pocket.oracle import LABELS, Oracle, name
from erase_sd.pocket.prompt_sets import exam
from erase_sd.pocket.score import GUIDANCE, STEPS
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training import oracle as judge
from erase_sd.pocket.training.vae import through
from erase_sd.pocket.world import KINDS, caption

FRESH = 4000  # renders
NEVER = 10_000_019  # seed of renders that no training drew


@torch.no_grad()
def measure(
    oracle: Oracle, vae: AutoencoderKL, known: Tensor, strangers: Tensor, model: Path, n: int
) -> dict[str, dict]:
    """Accuracy of the judge on renders, reconstructions and everything else; of the pipeline on n pictures."""
    x, labels = artwork.scenes(known, FRESH, generator(NEVER, "report"))
    y = torch.cat([through(vae)(part) for part in x.split(250)])
    return {
        "vae": {"l1": (x - y).abs().mean().item()},
        "oracle on renders": judge.accuracy(oracle, x, labels),
        "oracle on reconstructions": judge.accuracy(oracle, y, labels),
        "oracle says other": rejections(oracle, known, strangers),
        "pipeline": pipeline_accuracy(oracle, model, n),
    }


@torch.no_grad()
def rejections(oracle: Oracle, known: Tensor, strangers: Tensor, n: int = 500) -> dict[str, float]:
    """Share of pictures of nothing, by kind of nothing, in which the judge sees no object; icons never trained on."""
    rates = {}
    for i, make in enumerate(dict.fromkeys(judge.NOTHING)):
        x, labels = make(known, strangers, n, generator(NEVER, "nothing", i))
        judged = labels[:, 0] == len(LABELS["object"]) - 1
        rates[make.__name__.strip("_")] = (oracle(x)["object"].argmax(1) == labels[:, 0])[judged].float().mean().item()
    return rates


def pipeline_accuracy(oracle: Oracle, model: Path, n: int) -> dict[str, float]:
    """How often the pipeline draws what it is asked, over all combinations: 20 steps, its default guidance."""
    questions = exam([], 0, n)
    images = sample(
        load(str(model)),
        [caption(q.scene) for q in questions],
        [q.seed for q in questions],
        steps=STEPS,
        guidance=GUIDANCE,
        batch_size=64,
        description="exam",
    )
    seen = name(oracle, images)
    return {k: sum(a[k] == getattr(q.scene, k) for a, q in zip(seen, questions, strict=True)) / n for k in KINDS}
