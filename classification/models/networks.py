"""The networks in plain torch, with torchvision's parameter names, so that its checkpoints load and scopes go by name.

Every model takes float images in [0, 1], (B, C, H, W), normalises them itself and returns logits (B, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from classification.models.pretrained import load_weights, transformers_model
from erase_sd.common.errors import UserError
from erase_sd.common.rng import keyed_rng


def build(
    name: str,
    *,
    classes: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    weights: str | None = None,
    empty: bool = False,
) -> nn.Module:
    """Build a float32 model on the CPU, in training mode, that depends on its arguments alone.

    `name` is one of MODELS, or a folder or Hub id of a `transformers` image classifier, whose head is drawn anew when
    it has another number of classes. `mean` and `std` are per channel, of pixels in [0, 1]. `weights` fills a model of
    MODELS: "hub" (ImageNet, resnet34 only), or a local .safetensors or .pth file with torchvision's names; when the
    file's `fc` has another number of classes, the fresh one of this seed stays. `empty` asks for the architecture
    alone, without weights from elsewhere: others are about to take their place. Raises UserError for anything that is
    missing or does not fit. The global random state is left as it was.
    """
    normalize = Normalize(mean, std)
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"mean {mean} and std {std} must have one entry for each of the {channels} channels")
    with keyed_rng(seed, "init", name):
        if name in MODELS:
            model = MODELS[name](classes, channels, normalize)
            kaiming_(model)
        elif "/" in name or Path(name).is_dir():
            if weights is not None:
                raise UserError(f"--weights {weights} has no place with {name}, which brings its own: leave it out")
            return transformers_model(name, classes, channels, normalize, empty)
        else:
            raise UserError(f"unknown model {name}: choose {', '.join(MODELS)}, or name a folder or an owner/model")
    if weights is not None and not empty:
        load_weights(model, name, weights)
    return model


class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers, so that a saved model knows them; no parameters."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inside, outside, stride)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = conv3x3(outside, outside)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of basic blocks, with the stem for CIFAR (3x3, no pooling) or for ImageNet.

    `depths` and `widths` are the blocks and channels of layer1 to layer4.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        cifar: bool,
        classes: int,
        channels: int,
        normalize: Normalize,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        first = widths[0]
        self.conv1 = conv3x3(channels, first) if cifar else nn.Conv2d(channels, first, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(first, first, depths[0], 1)
        self.layer2 = stage(first, widths[1], depths[1], 2)
        self.layer3 = stage(widths[1], widths[2], depths[2], 2)
        self.layer4 = stage(widths[2], widths[3], depths[3], 2)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class SmallNet(nn.Module):
    """Four convolutions for 8x8 digits. GroupNorm, not BatchNorm: no statistics of the training data stay behind."""

    def __init__(self, classes: int, channels: int, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.layer1 = small_layer(channels, 16, 1)
        self.layer2 = small_layer(16, 32, 1)
        self.layer3 = small_layer(32, 64, 2)
        self.layer4 = small_layer(64, 64, 1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.normalize(x)))))
        return self.fc(x.mean((2, 3)))


def conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution, padded, without a bias: a normalisation follows."""
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=False)


def stage(inside: int, outside: int, depth: int, stride: int) -> nn.Sequential:
    """Return `depth` basic blocks, of which the first one widens and strides."""
    blocks = [BasicBlock(inside, outside, stride)]
    for _ in range(depth - 1):
        blocks.append(BasicBlock(outside, outside, 1))
    return nn.Sequential(*blocks)


def small_layer(inside: int, outside: int, stride: int) -> nn.Sequential:
    """Return convolution, GroupNorm in groups of 8 channels, ReLU."""
    return nn.Sequential(conv3x3(inside, outside, stride), nn.GroupNorm(outside // 8, outside), nn.ReLU())


def kaiming_(model: nn.Module) -> None:
    """Draw Kaiming-normal fan-out weights for every convolution in place, as torchvision and the authors do."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


MODELS = {
    "resnet18": partial(ResNet, (2, 2, 2, 2), (64, 128, 256, 512), True),
    "resnet34": partial(ResNet, (3, 4, 6, 3), (64, 128, 256, 512), False),
    "smallresnet": partial(ResNet, (1, 1, 1, 1), (16, 32, 64, 128), True),  # for 28x28 images on a laptop
    "smallnet": SmallNet,
}
"""Name: constructor from (classes, channels, normalize)."""
