"""Training data and training loop of the oracle: clean scenes and everything that must be called "other"."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.pocket.oracle import LABELS, SIZE, Oracle
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit
from erase_sd.pocket.world import BACKGROUNDS, OBJECTS, STYLES

STEPS, BATCH, LR = 2500, 128, 2e-3
IGNORE = -100
OTHER = torch.tensor([len(OBJECTS), len(STYLES), len(BACKGROUNDS)])  # class index of "other" per kind


def soften(x: Tensor, g: torch.Generator, low: float, high: float) -> Tensor:
    """Each picture blended with its 5x5 average by a random share: a cheap blur of random strength."""
    share = torch.rand(len(x), 1, 1, 1, generator=g) * (high - low) + low
    return x + share * (F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1) - x)


def _strangers(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Other icons in our styles and grounds."""
    draw = lambda high: torch.randint(high, (n,), generator=g)  # noqa: E731
    labels = torch.stack([torch.full((n,), len(OBJECTS)), draw(len(STYLES)), draw(len(BACKGROUNDS))], 1)
    return artwork.render(others[draw(len(others))], labels[:, 1], labels[:, 2], g), labels


def _blends(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two scenes over each other: no object; a style or ground only where both agree."""
    (x, a), (y, b) = artwork.scenes(known, n, g), artwork.scenes(known, n, g)
    share = torch.rand(n, 1, 1, 1, generator=g) * 0.3 + 0.35
    labels = torch.where(a == b, a, IGNORE)
    labels[:, 0] = torch.where(a[:, 0] == b[:, 0], IGNORE, len(OBJECTS))
    return share * x + (1 - share) * y, labels


def _blurs(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes averaged over a third of the picture: a smear of colour is no object and no style."""
    x, labels = artwork.scenes(known, n, g)
    x = F.avg_pool2d(F.pad(x, (5, 5, 5, 5), mode="replicate"), 11, 1)
    return x, torch.stack([OTHER[0].expand(n), OTHER[1].expand(n), labels[:, 2]], 1)


def _shuffles(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes cut into 8 x 8 pixel tiles and shuffled."""
    x, _ = artwork.scenes(known, n, g)
    tiles = F.unfold(x, 8, stride=8)[..., torch.randperm(16, generator=g)]
    return F.fold(tiles, SIZE, 8, stride=8), torch.tensor([[len(OBJECTS), IGNORE, IGNORE]]).expand(n, 3)


def _empty(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A bare ground: its colour and nothing else."""
    grounds = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    x = artwork.render(torch.zeros(n, 4, artwork.SPRITE, artwork.SPRITE), torch.zeros(n).long(), grounds, g)
    return x, torch.stack([OTHER[0].expand(n), OTHER[1].expand(n), grounds], 1)


def _noise(known: Tensor, others: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise from single pixels to blobs, some of it over a scene that it hides."""
    grain = int(torch.randint(4, (1,), generator=g))
    x = F.interpolate(torch.randn(n, 3, SIZE >> grain, SIZE >> grain, generator=g), size=SIZE, mode="bilinear")
    x[n // 2 :] += 0.5 * artwork.scenes(known, n - n // 2, g)[0]
    return x.clamp(-1, 1), OTHER.expand(n, 3)


NOTHING = (_strangers, _strangers, _blends, _blurs, _shuffles, _empty, _noise)


def batch(known: Tensor, others: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two thirds scenes, one third things that are none of the twenty objects; mild blur and noise over all."""
    x, labels = artwork.scenes(known, BATCH * 2 // 3, g)
    parts = [(x, labels)] + [make(known, others, BATCH // 3 // len(NOTHING), g) for make in NOTHING]
    x, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    x = soften(x, g, 0, 0.55)
    return x + torch.randn(x.shape, generator=g) * 0.12 * torch.rand(len(x), 1, 1, 1, generator=g), labels


def train(known: Tensor, others: Tensor, folder: Path, *, steps: int = STEPS, seed: int = 0) -> Oracle:
    """Train the judge on renders alone: it never sees what the VAE or the UNet makes of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        oracle = Oracle()

    def loss(step: int) -> Tensor:
        x, labels = batch(known, others, generator(seed, "judge", step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = oracle(x)
        return sum(
            F.cross_entropy(logits[kind].float(), labels[:, i], ignore_index=IGNORE, label_smoothing=0.02)
            for i, kind in enumerate(LABELS)
        )

    fit(oracle, loss, folder, steps=steps, lr=LR, weight_decay=1e-2)
    return oracle.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(oracle: Oracle, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of pictures (N, 3, 32, 32) whose object / style / background is named as in labels (N, 3)."""
    logits = oracle(x)
    return {kind: (logits[kind].argmax(1) == labels[:, i]).float().mean().item() for i, kind in enumerate(LABELS)}


def split(others: Tensor) -> tuple[Tensor, Tensor]:
    """Other icons to train on and others to test on: every sixth is kept back."""
    kept = torch.arange(len(others)) % 6 == 0
    return others[~kept], others[kept]


def packed(oracle: Oracle) -> bytes:
    """The judge's weights as an fp16 safetensors file."""
    return save({name: tensor.half() for name, tensor in oracle.state_dict().items()})
