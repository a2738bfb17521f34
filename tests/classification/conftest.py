"""A classifier and a few dozen random images: small enough to follow every method by hand."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from classification.data.dataset import Dataset, Images
from classification.settings import ClassifierSettings
from classification.task import ClassificationTask
from erase_sd.common.processes import accelerator
from erase_sd.common.rng import generator

CLASSES = 4


class TinyNet(nn.Module):
    """The names that the released code goes by, batch norms among them, and 1 062 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.layer3 = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.layer4 = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, CLASSES)
        for name, p in self.named_parameters():
            if "bn" not in name and ".1." not in name:
                p.data = torch.randn(p.shape, generator=generator(0, "tiny", name)) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x - 0.5)).tanh()
        return self.fc(self.layer4(self.layer3(x).tanh()).mean((2, 3)))


def images(name: str, n: int) -> Images:
    g = generator(0, name)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    return Images(pixels=pixels, labels=labels, ids=tuple(f"{name}/{i}" for i in range(n)))


@pytest.fixture
def tiny_task() -> Callable[..., ClassificationTask]:
    """tiny_task(ranks=1, rank=0, augment="none", **knobs of Losses): 12 images to forget and 21 to retain."""

    def make(ranks: int = 1, rank: int = 0, augment: str = "none", **knobs) -> ClassificationTask:
        forget, retain = images("forget", 12), images("retain", 21)
        dataset = Dataset(
            name="tiny",
            train=retain,
            test=retain,
            classes=tuple(map(str, range(CLASSES))),
            mean=(0.5,),
            std=(0.3,),
            augment=augment,
        )
        accel = accelerator(None)
        if ranks > 1:
            accel = SimpleNamespace(device=torch.device("cpu"), num_processes=ranks, process_index=rank)
        return ClassificationTask(
            TinyNet(), dataset, forget, retain, ClassifierSettings(**{"batch_size": 8} | knobs), 0, accel
        )

    return make
