"""A task small enough to check by hand, and the settings of the repair loop that the tests go through."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.repair import Repair
from erase_sd.core.task import REPLICATED, MicroBatch

SETTINGS = {
    "paper": {},
    "off": {"projection": "off"},
    "adamw": {"optimizer": "adamw"},
    "after": {"optimizer": "adamw", "projection": "after-preconditioning"},
    "redirect": {"objective": "redirect"},
    "redirect-contrast": {"objective": "redirect", "constraint": "contrast", "optimizer": "adamw"},
    "redirect-off": {"objective": "redirect", "projection": "off"},
    "contrast": {"constraint": "contrast"},
    "contrast-off": {"constraint": "contrast", "projection": "off"},
    "contrast-after": {"constraint": "contrast", "projection": "after-preconditioning"},
    "late": {"project_from": 3, "schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5},
    "released": {"margin": 0.5, "ridge": 1e-3},
    "resting": {"objective": "redirect", "constraint": "contrast", "release_at": 0.0},
    "resting-after": {"constraint": "contrast", "release_at": 0.0, "projection": "after-preconditioning"},
    "preserving": {"objective": "redirect", "retain_loss": "original"},
}


class ToyTask:
    """5 features, 3 labels: on the forget inputs 2 is forgotten for 0; retain knows 2 too, so the gradients meet."""

    shards = REPLICATED

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (8,)) -> None:
        self.seed, self.sizes = seed, sizes
        self.model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        for name, p in self.model.named_parameters():
            p.data = torch.randn(p.shape, generator=generator(seed, "init", name), dtype=dtype)
        self.original = copy.deepcopy(self.model)
        self.backwards = 0
        self.limit = 8  # samples that fit the device at a time

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name != "0.bias"}

    def trimmable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("1.")}

    def batch(self, purpose: str, step: int) -> dict[str, Tensor]:
        rng, dtype = generator(self.seed, purpose, step), self.model[0].weight.dtype
        x = torch.randn(2, 8, 5, generator=rng, dtype=dtype)
        return {"forget": x[0] + 1, "retain": x[1], "labels": torch.randint(1, 3, (8,), generator=rng)}

    def micro_batches(self, batch: dict[str, Tensor]) -> Iterator[MicroBatch]:
        """The batch of 8 in micro-batches of these sizes."""
        pieces = zip(*(x.split(self.sizes) for x in batch.values()), strict=True)
        for i, (n, piece) in enumerate(zip(self.sizes, pieces, strict=True), start=1):
            yield MicroBatch(dict(zip(batch, piece, strict=True)), n / 8, i == len(self.sizes))

    def _loss(self, x: Tensor, label: Tensor | int) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        label = label if isinstance(label, Tensor) else torch.full((len(x),), label)
        return F.cross_entropy(self.model(x), label)

    def forget(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["forget"], 2)

    def retain(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["retain"], batch["labels"])

    def preserve(self, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self.model(batch["retain"]), self.original(batch["retain"]).detach())

    def redirect(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(batch["forget"], 0)

    def contrast(self, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        yield self.forget(batch)
        yield -self.redirect(batch)

    def smaller(self) -> bool:
        """Halve every micro-batch."""
        if max(self.sizes) == 1:
            return False
        halves = [(n - n // 2, n // 2) for n in self.sizes]
        self.sizes = tuple(n for pair in halves for n in pair if n)
        return True

    def backward(self, loss: Tensor) -> None:
        self.backwards += 1
        loss.backward()

    def mean(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def toy() -> Callable[..., ToyTask]:
    """ToyTask(seed, dtype, sizes): equal arguments give equal models."""
    return ToyTask


def configured(name: str, **changes: object) -> Repair:
    """Six steps of one of the settings, with changes."""
    return Repair(**{"steps": 6, "lr": 0.05, "lam": 0.2} | SETTINGS[name] | changes)


@pytest.fixture
def settings() -> Callable[..., Repair]:
    """settings(name, **changes): knobs of one named setting."""
    return configured


@pytest.fixture(params=SETTINGS)
def knobs(request: pytest.FixtureRequest) -> Repair:
    """Every setting in turn."""
    return configured(request.param)
