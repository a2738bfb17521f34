"""What graphs keep: counted without computing, against the storages that a real step has alive."""

import weakref
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erase_sd.models.activations import count, largest_micro_batch
from erase_sd.models.families import family
from erase_sd.models.parameters import select
from tests.conftest import SD14_UNET

WIDTHS = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 32}
KIND = family("StableDiffusionPipeline")


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive; the most at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.refs: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.refs:
                self.count(x.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.now -= size
            self.refs.pop(key, None)

        self.refs[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SD14_UNET | WIDTHS)


def alive(n: int, side: int, scope: str, checkpointing: bool) -> int:
    """The most that one real denoising loss and its backward pass have alive beside weights and gradients."""
    network = unet().requires_grad_(False)
    for p in select(network, scope).values():
        p.requires_grad_(True)
        p.grad = torch.zeros_like(p)
    if checkpointing:
        network.enable_gradient_checkpointing()
    live = Live()
    for p in network.parameters():
        for x in (p, p.grad):
            if x is not None:
                live.refs[x.untyped_storage()._cdata] = weakref.ref(x)
    x_t, cond = torch.zeros(n, 4, side, side), {"encoder_hidden_states": torch.zeros(n, 77, 32)}
    with live:
        loss = KIND.call(network, x_t, torch.ones(n), cond).square().mean()
        loss.backward()
    return live.most


@pytest.mark.parametrize(("scope", "checkpointing"), [("full", False), ("xattn", False), ("full", True)])
@pytest.mark.parametrize("side", [32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [1, 2])
def test_the_prediction_is_what_a_step_has_alive(n: int, side: int, scope: str, checkpointing: bool) -> None:
    with torch.device("meta"):
        network = unet()
    predicted = count(network, KIND, select(network, scope), (4, side, side)).of(n, checkpointing)
    assert predicted == pytest.approx(alive(n, side, scope, checkpointing), rel=0.15)


def test_autocast_keeps_rounded_weights_once_and_half_of_most_else() -> None:
    with torch.device("meta"):
        network = unet()
    names = select(network, "full")
    latents = (4, 40, 56)  # of no power of two: no activation has the shape of a weight, by which weights are told
    wide, narrow = (count(network, KIND, names, latents, autocast=on) for on in (False, True))
    matrices = 2 * sum(p.numel() for p in names.values() if p.ndim > 1)
    assert wide.fixed == 0
    assert 0.9 * matrices < narrow.fixed <= matrices
    assert 0.5 * wide.sample < narrow.sample < 0.8 * wide.sample  # norms stay in fp32


def test_the_meta_network_is_left_as_it_was() -> None:
    with torch.device("meta"):
        network = unet()
    before = [(p.device, p.dtype, p.requires_grad) for p in network.parameters()]
    count(network, KIND, ["conv_in.weight"], (4, 32, 32), torch.bfloat16)
    assert [(p.device, p.dtype, p.requires_grad) for p in network.parameters()] == before


@pytest.mark.parametrize(("most", "found"), [(16, 16), (15, 8), (3, 2), (1, 1), (0, None)])
def test_the_micro_batch_is_what_halving_comes_to(most: int, found: int | None) -> None:
    assert largest_micro_batch(16, lambda n: n <= most) == found
