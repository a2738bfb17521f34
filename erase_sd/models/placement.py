"""Where the parts of a pipeline are, and in which precision the network is, while a run needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from diffusers import ModelMixin


ROOM = 0.7  # of the free memory that weights may fill: what is computed from them needs the rest


def half_precision(device: torch.device) -> torch.dtype | None:
    """Return the half precision in which a device draws: bf16, or fp16 where it has none; None on others than CUDA."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device."""
    return torch.cuda.mem_get_info(device)[0]


def parking(device: torch.device) -> torch.device:
    """Return where parts wait while they are not needed: the CPU beside a device that draws in half precision."""
    return torch.device("cpu") if half_precision(device) else device


@contextmanager
def sampling_on(network: nn.Module, parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Have the parts compute on the device, the network in its half precision; afterwards they are as they were.

    Text encoders and the autoencoder keep their own precision: captions are encoded for training too, and SDXL's
    autoencoder overflows in a narrower one. Parts that do not fit together take turns. Where the device has no half
    precision, nothing is done.
    """
    half = half_precision(device)
    if half is None:
        yield
        return
    stage = Stage(device, together=_size(network, half, parts) <= ROOM * free_memory(device))
    replaced = [part.__dict__.get("forward") for part in parts]
    for part in parts:
        add_hook_to_module(part, Lending(stage, part, half if part is network else None))
    try:
        yield
    finally:
        for part, forward in zip(parts, replaced, strict=True):
            remove_hook_from_module(part)
            if forward is None:
                part.__dict__.pop("forward", None)  # accelerate leaves the method there
        stage.clear()


def _size(network: nn.Module, half: torch.dtype, parts: list[nn.Module]) -> int:
    """Return the bytes of all parts, the network's in half precision."""
    total = 0
    for part in parts:
        for p in part.parameters():
            total += p.numel() * (half.itemsize if part is network else p.element_size())
    return total


class Stage:
    """A device on which copies of the parts' tensors stand in for them: all `together`, or one part at a time."""

    def __init__(self, device: torch.device, together: bool) -> None:
        self.device, self.together = device, together
        self._own: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # tensors of those on stage, and what is theirs

    def enter(self, part: nn.Module, dtype: torch.dtype | None) -> None:
        """Put a part on the device, its floating-point tensors in `dtype`; the others leave unless all fit."""
        if part in self._own:
            return
        if not self.together:
            self.clear()
        own = []
        for x in (*part.parameters(), *part.buffers()):
            own.append((x, x.data))
            x.data = x.data.to(self.device, dtype if x.is_floating_point() else None)
        self._own[part] = own

    def clear(self) -> None:
        """Give every part its own tensors back."""
        for own in self._own.values():
            for x, data in own:
                x.data = data
        self._own.clear()


class Lending(ModelHook):
    """Puts a part on the stage when it is called, with inputs and outputs as the pipeline expects them."""

    def __init__(self, stage: Stage, part: nn.Module, dtype: torch.dtype | None) -> None:
        self.stage, self.part, self.dtype = stage, part, dtype
        self.execution_device = stage.device  # by which the pipeline knows where to compute

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Put the part on the device and its inputs beside it: those of several dimensions in its precision."""
        self.stage.enter(self.part, self.dtype)
        return tree_map(self._input, args), tree_map(self._input, kwargs)

    def _input(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        narrow = self.dtype is not None and x.is_floating_point() and x.ndim > 1  # not timesteps
        return send_to_device(x, self.stage.device).to(self.dtype if narrow else x.dtype)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Return the output in fp32."""
        return output if self.dtype is None else convert_to_fp32(output)


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
    """Leave the network alone, in `dtype`; afterwards all parts are on the device again, the network as it was.

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
        nn.Module.to(network, device, before)
        for part in others:
            part.to(device)
