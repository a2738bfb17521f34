"""Where the parts of a pipeline are, and in which precision the network is, while a run needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

if TYPE_CHECKING:
    from diffusers import ModelMixin


@contextmanager
def placed(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Move all parts to the device; afterwards each is where it was, with the `requires_grad` it had.

    Hooks that would move a part away, of `enable_model_cpu_offload`, are off meanwhile.
    """
    before: list[tuple[torch.device, list[bool]]] = []
    hooks: dict[nn.Module, ModelHook] = {}
    for part in parts:
        if hook := getattr(part, "_hf_hook", None):
            hooks[part] = hook
            remove_hook_from_module(part)
        before.append((part.device, [p.requires_grad for p in part.parameters()]))
        part.to(device)
    try:
        yield
    finally:
        for part, (place, flags) in zip(parts, before, strict=True):
            part.to(place)
            for p, flag in zip(part.parameters(), flags, strict=True):
                p.requires_grad_(flag)
        for part, hook in hooks.items():
            add_hook_to_module(part, hook)


@contextmanager
def training(
    network: ModelMixin, parts: list[nn.Module], device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> Iterator[None]:
    """Leave the network alone on the device, in `dtype`; afterwards all parts are there again, the network as it was.

    With `checkpointing` it keeps the activations between its blocks only and computes the others twice.
    """
    others = [part for part in parts if part is not network]
    before, checkpointed = network.dtype, network.is_gradient_checkpointing
    for part in others:
        part.to("cpu")  # embeddings and latents are cached: text encoders and the autoencoder have nothing to do
    nn.Module.to(network, dtype)  # diffusers' own warns of modules to keep in fp32, of which these networks have none
    if checkpointing:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not checkpointed:
            network.disable_gradient_checkpointing()
        nn.Module.to(network, before)
        for part in others:
            part.to(device)
