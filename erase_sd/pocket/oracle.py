"""The judge of the pocket world: a small CNN that names object, style and background, or says "other".

"other" is a class of its own, trained on other icons, blends, blurs, shuffled patches, empty grounds and noise: a
ruined picture counts as no concept, so that breaking a model never looks like erasing from it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from erase_sd.pocket.world import KINDS

OTHER = "other"
LABELS = {kind: [*names, OTHER] for kind, names in KINDS.items()}
WEIGHTS = Path(__file__).parent / "oracle.safetensors"
SIZE = 32  # pixels; larger pictures are averaged down


class Oracle(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> logits per kind: object (B, 21), style (B, 5), background (B, 9)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 32, 64, 64, 96, 96, 128]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
            if i in (1, 3, 5):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleDict()
        for kind, names in LABELS.items():
            self.heads[kind] = nn.Linear(2 * widths[-1], len(names))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits per kind from average- and max-pooled features."""
        h = self.features(x)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return {kind: head(h) for kind, head in self.heads.items()}


def load(path: Path = WEIGHTS) -> Oracle:
    """Return the embedded judge in evaluation mode, fp32."""
    oracle = Oracle()
    oracle.load_state_dict(load_file(path))  # which converts the file's half precision
    return oracle.eval().requires_grad_(False)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Return PIL images as (N, 3, 32, 32) in [-1, 1]; larger ones are averaged down."""
    rows = []
    for image in images:
        x = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).float() / 127.5 - 1
        rows.append(F.adaptive_avg_pool2d(x, SIZE))
    return torch.stack(rows)


@torch.no_grad()
def name(oracle: Oracle, images: list[Image.Image], batch_size: int = 256) -> list[dict[str, str]]:
    """Return what each image shows: {"object": "cat", "style": "pencil", "background": "other"}."""
    found: list[dict[str, str]] = []
    for i in range(0, len(images), batch_size):
        logits = oracle(to_tensor(images[i : i + batch_size]))
        answers: list[dict[str, str]] = [{} for _ in images[i : i + batch_size]]
        for kind, names in LABELS.items():
            for answer, best in zip(answers, logits[kind].argmax(1).tolist(), strict=True):
                answer[kind] = names[best]
        found += answers
    return found
