"""Weights of another network of the tiny model's shape, as other projects would publish parts of them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names and shapes and of other values."""
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(x.shape, generator=g) if x.is_floating_point() else x for name, x in state.items()}


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that are not the same bit for bit."""
    return {name for name in before.keys() | after.keys() if not torch.equal(before[name], after[name])}


@pytest.fixture
def theirs(tiny_pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Another UNet, by diffusers' names."""
    return other(tiny_pipe.unet.state_dict())


@pytest.fixture
def their_encoder(tiny_pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Another text encoder, by the names that transformers has in memory, without "text_model."."""
    state = other(tiny_pipe.text_encoder.state_dict())
    return {name.removeprefix("text_model."): x for name, x in state.items()}
