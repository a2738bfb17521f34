"""What a forward pass keeps for its backward pass, counted on the network itself, without computing or allocating."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from erase_sd.models.families import Cond, Family

NORMS = ("GroupNorm", "LayerNorm", "RMSNorm")  # what a GPU's autocast computes in fp32


class Activations(NamedTuple):
    """Bytes that the graph of n samples keeps: fixed + n * sample; `twice` are those with checkpointing."""

    fixed: int  # the weights as autocast rounds them
    sample: int
    twice: tuple[int, int] = (0, 0)  # fixed and per sample: between the blocks, and inside the largest of them

    def of(self, n: int, checkpointing: bool = False) -> int:
        """Return the bytes of n samples in one graph."""
        fixed, sample = self.twice if checkpointing else (self.fixed, self.sample)
        return fixed + n * sample


def count(
    network: nn.Module,
    kind: Family,
    trained: Collection[str],
    latents: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> Activations:
    """Return what one denoising loss keeps of a network on the meta device.

    `latents` is the shape (C, H, W) of a sample, `trained` the names of the parameters that get a gradient, `dtype`
    that of the weights; `autocast` is a GPU's, to bf16. Saved tensors are counted where autograd saves them, each
    storage once, parameters left out.
    """
    one, twice_one = _kept(network, kind, trained, latents, dtype, autocast, 1)
    if not autocast:
        return Activations(0, one, (0, twice_one))
    two, twice_two = _kept(network, kind, trained, latents, dtype, autocast, 2)
    return Activations(2 * one - two, two - one, (2 * twice_one - twice_two, twice_two - twice_one))


def _kept(
    network: nn.Module,
    kind: Family,
    trained: Collection[str],
    latents: tuple[int, ...],
    dtype: torch.dtype,
    autocast: bool,
    n: int,
) -> tuple[int, int]:
    """Return the bytes that the graph of n samples keeps, and those with checkpointing."""
    ledger, network = _Ledger(), nn.Module.to(copy.deepcopy(network), dtype)  # whose parameters are replaced
    with FakeTensorMode(allow_non_fake_inputs=True), _observed(network, ledger, autocast):
        network.to_empty(device="cpu")
        for name, p in network.named_parameters():
            p.requires_grad_(name in trained)
            ledger.seen.add(p.untyped_storage()._cdata)
        x_t = torch.zeros(n, *latents, dtype=dtype)
        cond = _conditioning(kind, network, dtype, n)
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, _give_back):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                predicted = kind.call(network, x_t, torch.ones(n), cond).float()
            nn.functional.mse_loss(predicted, torch.zeros_like(predicted))
    return ledger.total, min(ledger.total, ledger.twice())


class _Ledger:
    """Bytes of saved storages, by the block that saved them, and of what enters the blocks."""

    def __init__(self) -> None:
        self.seen: set[int] = set()  # storages that are counted, or are parameters
        self.total = 0
        self.inside: dict[int, int] = {}
        self.borders: dict[int, int] = {}
        self.blocks: list[int] = []  # those that are being computed, the innermost last
        self._alive: list[Tensor] = []  # so that no address is given away twice

    def twice(self) -> int:
        """Return the bytes with checkpointing: what no block keeps, what enters the blocks, and the largest block."""
        outside = self.total - sum(self.inside.values())
        return outside + sum(self.borders.values()) + max(self.inside.values(), default=0)

    def keep(self, x: Tensor) -> Tensor:
        """Count what autograd saves, for the innermost block."""
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self._alive.append(x)
            self.total += storage.nbytes()
            for block in self.blocks[-1:]:
                self.inside[block] = self.inside.get(block, 0) + storage.nbytes()
        return x

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note what a block is given: checkpointing keeps it."""
        self.blocks.append(id(block))
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.requires_grad:
                storage = x.untyped_storage()
                self.borders[storage._cdata] = storage.nbytes()
                self._alive.append(x)

    def leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Note that a block is through."""
        self.blocks.pop()


def _give_back(x: Tensor) -> Tensor:
    return x


@contextmanager
def _observed(network: nn.Module, ledger: _Ledger, autocast: bool) -> Iterator[None]:
    """Tell the ledger of the blocks that checkpointing computes twice; norms in fp32 under autocast."""
    handles = []
    for block in _blocks(network):
        handles.append(block.register_forward_pre_hook(ledger.enter, with_kwargs=True))
        handles.append(block.register_forward_hook(ledger.leave))
    for layer in network.modules() if autocast else ():
        if type(layer).__name__ in NORMS:
            handles.append(layer.register_forward_pre_hook(_widened))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widened(layer: nn.Module, args: tuple) -> tuple:
    return (args[0].float(), *args[1:])


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that gradient checkpointing wraps: members of lists whose owner knows of it, the innermost."""
    for owner in network.modules():
        if not hasattr(owner, "gradient_checkpointing"):
            continue
        for members in owner.children():
            if isinstance(members, nn.ModuleList):
                for member in members:
                    if not any(hasattr(inner, "gradient_checkpointing") for inner in member.modules()):
                        yield member


def _conditioning(kind: Family, network: nn.Module, dtype: torch.dtype, n: int) -> Cond:
    """Return the conditioning of n captions, of the family's shapes."""
    cond: Cond = {}
    for name, shape in kind.shapes(network.config).items():
        cond[name] = torch.zeros(n, *shape, dtype=dtype)
    return cond


def largest_micro_batch(batch: int, fits: Callable[[int], bool]) -> int | None:
    """Return the micro-batch that halving comes to, as the run does; None where not even one sample fits."""
    parts = 1
    while True:
        n = -(-batch // parts)
        if fits(n):
            return n
        if n == 1:
            return None
        parts = min(2 * parts, batch)
