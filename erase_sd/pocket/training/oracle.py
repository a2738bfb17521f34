"""The oracle at 64 px and its training: clean scenes, and everything that must be called "other"."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit, fit_cycles
from erase_sd.pocket.world import BACKGROUNDS, KINDS, OBJECTS, STYLES

CYCLES, PEAKS, BATCH = (1800, 1000), (2e-3, 1.2e-3), 48
REUSE = 3  # steps for which one batch of renders serves, mirrored, softened and noised anew
SIZE = artwork.SIZE
LABELS = {kind: [*names, "other"] for kind, names in KINDS.items()}
IGNORE = -100
OTHER = torch.tensor([len(OBJECTS), len(STYLES), len(BACKGROUNDS)])  # class index of "other" per kind


class Oracle64(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> logits per kind: object (B, 21), style (B, 5), background (B, 9)."""

    WIDTHS = (3, 24, 32, 64, 64, 96, 128)
    POOLED = (1, 3)  # layers after which the resolution halves; the first one halves it by its stride

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i, (narrow, wide) in enumerate(pairwise(self.WIDTHS)):
            conv = nn.Conv2d(narrow, wide, 3, padding=1) if i else nn.Conv2d(narrow, wide, 5, 2, padding=2)
            self.layers.append(nn.Sequential(conv, nn.GroupNorm(8, wide), nn.SiLU()))
        self.heads = nn.ModuleDict()
        for kind, names in LABELS.items():
            self.heads[kind] = nn.Linear(2 * self.WIDTHS[-1], len(names))

    def features(self, x: Tensor) -> list[Tensor]:
        """Return maps of every layer before pooling: (B, 24, 32, 32) to (B, 128, 8, 8)."""
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            maps.append(x)
            if i in self.POOLED:
                x = F.max_pool2d(x, 2)
        return maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits per kind from average- and max-pooled features."""
        last = self.features(x)[-1]
        pooled = torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1)
        return {kind: head(pooled) for kind, head in self.heads.items()}


def load(path: Path) -> Oracle64:
    """Load the oracle of a file in evaluation mode, fp32."""
    oracle = Oracle64()
    oracle.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return oracle.eval().requires_grad_(False)


def soften(x: Tensor, g: torch.Generator, low: float, high: float) -> Tensor:
    """Blend each picture with its 5x5 average by a random share: a cheap blur of random strength."""
    share = torch.rand(len(x), 1, 1, 1, generator=g) * (high - low) + low
    return x + share * (F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1) - x)


def _strangers(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw other icons in our styles and grounds."""
    labels = torch.stack([torch.randint(len(names), (n,), generator=g) for names in KINDS.values()], 1)
    labels[:, 0] = len(OBJECTS)
    icons = others[torch.randint(len(others), (n,), generator=g)]
    return artwork.render(icons, labels[:, 1], labels[:, 2], g), labels


def _blends(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lay two scenes over each other: no object; a style or ground only where both agree."""
    (x, a), (y, b) = artwork.scenes(known, n, g), artwork.scenes(known, n, g)
    share = torch.rand(n, 1, 1, 1, generator=g) * 0.3 + 0.35
    labels = torch.where(a == b, a, IGNORE)
    labels[:, 0] = torch.where(a[:, 0] == b[:, 0], IGNORE, len(OBJECTS))
    return share * x + (1 - share) * y, labels


def _blurs(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Average scenes over a third of the picture: a smear of colour is no object and no style."""
    x, labels = artwork.scenes(known, n, g)
    x = F.avg_pool2d(F.pad(x, (10, 10, 10, 10), mode="replicate"), 21, 1)
    return x, torch.stack([OTHER[0].expand(n), OTHER[1].expand(n), labels[:, 2]], 1)


def _shuffles(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut scenes into sixteen tiles and shuffle these."""
    x, _ = artwork.scenes(known, n, g)
    tiles = F.unfold(x, SIZE // 4, stride=SIZE // 4)[..., torch.randperm(16, generator=g)]
    x = F.fold(tiles, SIZE, SIZE // 4, stride=SIZE // 4)
    return x, torch.tensor([[len(OBJECTS), IGNORE, IGNORE]]).expand(n, 3)


def _empty(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a bare ground: its colour and nothing else."""
    grounds = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    x = artwork.render(torch.zeros(n, 4, artwork.SPRITE, artwork.SPRITE), torch.zeros(n).long(), grounds, g)
    return x, torch.stack([OTHER[0].expand(n), OTHER[1].expand(n), grounds], 1)


def _noise(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise from single pixels to blobs, some of it over a scene that it hides."""
    grain = int(torch.randint(4, (1,), generator=g))
    x = F.interpolate(torch.randn(n, 3, SIZE >> grain, SIZE >> grain, generator=g), size=SIZE, mode="bilinear")
    x[n // 2 :] += 0.5 * artwork.scenes(known, n - n // 2, g)[0]
    return x.clamp(-1, 1), OTHER.expand(n, 3)


NOTHING = (_strangers, _strangers, _blends, _blurs, _shuffles, _empty, _noise)


def batch(known: Tensor, others: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two thirds scenes, one third things that are none of the twenty objects."""
    parts = [artwork.scenes(known, BATCH * 2 // 3, g)]
    for make in NOTHING:
        parts.append(make(known, others, max(2, BATCH // 3 // len(NOTHING)), g))
    pictures, labels = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(labels)


def worn(x: Tensor, g: torch.Generator) -> Tensor:
    """Mirror half of the pictures (B, 3, 64, 64) and put mild blur and noise over all."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=g) < 0.5
    x = soften(torch.where(mirrored, x.flip(-1), x), g, 0, 0.55)
    return x + torch.randn(x.shape, generator=g) * 0.12 * torch.rand(len(x), 1, 1, 1, generator=g)


def train(
    known: Tensor,
    others: Tensor,
    folder: Path,
    *,
    cycles: tuple[int, ...] = CYCLES,
    seed: int = 0,
    device: str = "cpu",
) -> Oracle64:
    """Train the oracle on renders alone: it never sees what the VAE or the UNet makes of them.

    One learning-rate cycle follows another, each from the averaged weights so far; after the first it knows enough to
    teach the VAE.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        oracle = Oracle64().to(device)

    @lru_cache(maxsize=1)
    def renders(turn: int) -> tuple[Tensor, Tensor]:
        return batch(known, others, generator(seed, "oracle renders", turn))

    def cycle(i: int, before: int, place: Path) -> None:
        loss = partial(classification_loss, oracle, renders, seed, before)
        fit(oracle, loss, place, steps=cycles[i], lr=PEAKS[min(i, len(PEAKS) - 1)], weight_decay=1e-2)

    fit_cycles(cycles, cycle, folder)
    return oracle.eval().requires_grad_(False).cpu()


def classification_loss(
    oracle: Oracle64, renders: Callable[[int], tuple[Tensor, Tensor]], seed: int, before: int, step: int
) -> Tensor:
    """Add the cross-entropies of object, style and background on the batch of step `before + step`."""
    x, labels = renders((before + step) // REUSE)
    x = worn(x, generator(seed, "oracle", before + step))
    device = next(oracle.parameters()).device
    total = torch.zeros((), device=device)
    for logits, wanted in zip(oracle(x.to(device)).values(), labels.to(device).unbind(1), strict=True):
        total = total + F.cross_entropy(logits, wanted, ignore_index=IGNORE, label_smoothing=0.02)
    return total


@torch.no_grad()
def seen(oracle: Oracle64, x: Tensor) -> Tensor:
    """Name what pictures (N, 3, 64, 64) show, as class indices (N, 3)."""
    parts = []
    for some in x.split(256):
        parts.append(torch.stack([logits.argmax(1) for logits in oracle(some).values()], 1))
    return torch.cat(parts)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Turn PIL pictures into (N, 3, 64, 64) in [-1, 1]; larger ones are averaged down."""
    pictures = []
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).float() / 127.5 - 1
        pictures.append(F.adaptive_avg_pool2d(pixels, SIZE))
    return torch.stack(pictures)


def split(others: Tensor) -> tuple[Tensor, Tensor]:
    """Divide other icons into those to train on and those to test on: every sixth is kept back."""
    kept = torch.arange(len(others)) % 6 == 0
    return others[~kept], others[kept]


def packed(oracle: Oracle64) -> bytes:
    """Write the oracle's weights as an fp16 safetensors file."""
    return save({name: tensor.half() for name, tensor in oracle.state_dict().items()})
