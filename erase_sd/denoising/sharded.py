"""Erasing from a network that does not fit: every process holds its rows of each parameter (FSDP2) and trains those.

The algorithm works on plain parameters that share their memory with the shards. Checkpoints and the result are whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from erase_sd.common.errors import UserError

CARRIERS = {torch.int16: torch.float16}  # neither gloo nor NCCL knows int16, which is only carried, bit for bit


def wanted(accelerator: Accelerator, fsdp: bool) -> bool:
    """Return whether to shard: asked for here or in accelerate's configuration, and there are processes to share.

    Raises UserError for version 1 of FSDP, whose flat parameters know neither names nor shapes.
    """
    configured = accelerator.distributed_type == DistributedType.FSDP
    if configured and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("fsdp_version 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    return (fsdp or configured) and accelerator.num_processes > 1


class Sharded:
    """A copy of a network of which this process holds the rows that torch.chunk gives its rank, perhaps none.

    `forward` computes like the whole network; `rows` are this process's rows, plain parameters by name; `model` has
    both. `whole`, on the CPU, is what is copied, and takes the result in `assemble`. `original` is divided as well.
    """

    def __init__(self, whole: nn.Module, original: nn.Module | None, accelerator: Accelerator) -> None:
        self.whole, self.accelerator, self.dtype = whole, accelerator, whole.dtype
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.device = torch.device(self.mesh.device_type)
        self.original = None if original is None else _divide(original, self.mesh)
        self.model = nn.Module()
        self.model.network = _divide(copy.deepcopy(whole), self.mesh)
        self.shards: dict[str, DTensor] = dict(self.model.network.named_parameters())
        self.rows: dict[str, nn.Parameter] = {}
        for name, shard in self.shards.items():
            self.rows[name] = nn.Parameter(shard.detach().to_local(), shard.requires_grad)
        self.model.rows = nn.ParameterList(self.rows.values())  # so that model.parameters() has them

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """Return the network's output in the precision that accelerate was given."""
        with self.accelerator.autocast():
            return self.model.network(*inputs, **more)

    def owned(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return this rank's rows of these parameters of the whole network."""
        return {name: self.rows[name] for name in params}

    def without_sync(self) -> AbstractContextManager:
        """Return a context that changes nothing: whole gradients would have to be kept until the last micro-batch."""
        return nullcontext()

    def after_backward(self) -> None:
        """Add the gradients that a backward pass left on the shards to those of the rows."""
        for name, shard in self.shards.items():
            if shard.grad is not None:
                g, p, shard.grad = shard.grad.to_local(), self.rows[name], None
                p.grad = g if p.grad is None else p.grad.add_(g)

    def assemble(self) -> None:
        """Copy the rows of all ranks into the whole network; every rank has to."""
        for name, p in self.whole.named_parameters():
            p.data.copy_(self._full(name, self.rows[name].detach()))

    def release(self) -> None:
        """Put the whole network on the device again, and drop the shards."""
        self.whole.to(self.accelerator.device).requires_grad_(False)
        del self.model, self.original, self.shards, self.rows

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def exclusive_scan(self, x: Tensor) -> Tensor:
        """Return the sum over the lower ranks."""
        here = x.to(self.device).contiguous()
        everyone = [torch.empty_like(here) for _ in range(self.mesh.size())]
        dist.all_gather(everyone, here)
        return sum(everyone[: self.mesh.get_rank()], torch.zeros_like(here)).to(x.device)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return undivided tensors on the CPU of the main process, which writes them; nothing on the others.

        Names are <parameter> or <parameter>/<slot>. Every rank has to ask.
        """
        found = {}
        for name, x in tensors.items():
            full = self._full(name, x.detach())
            if self.accelerator.is_main_process:
                found[name] = full
        return found

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's rows of what `gather` returned."""
        return {name: self._rows_of(name, x) for name, x in tensors.items()}

    def _full(self, name: str, x: Tensor) -> Tensor:
        """Return a tensor, on the CPU, from the rows of all ranks; x itself where it has none, such as a count."""
        shard = self._shard(name)
        if shard is None or x.shape != shard.to_local().shape:
            return x.cpu()
        bits = x.view(CARRIERS.get(x.dtype, x.dtype)).to(self.device)
        sizes = {"shape": shard.shape, "stride": shard.stride()}
        rows = DTensor.from_local(bits, self.mesh, shard.placements, run_check=False, **sizes)
        return rows.full_tensor().cpu().view(x.dtype)

    def _rows_of(self, name: str, x: Tensor) -> Tensor:
        """Return this rank's rows of a tensor; x itself where it has none."""
        shard = self._shard(name)
        if shard is None or x.shape != shard.shape:
            return x
        rows = -(-len(x) // self.mesh.size())
        return x[rows * self.mesh.get_rank() :][:rows].clone()

    def _shard(self, name: str) -> DTensor | None:
        """Return the parameter that a name such as <parameter>/<slot> or <pass>/<parameter> is about."""
        for part in name.split("/"):
            if part in self.shards:
                return self.shards[part]
        return None


def _divide(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Return the network itself, sharded block by block, so that only a block's parameters are whole at a time."""
    blocks = set(network._no_split_modules or ())
    inside_out = [module for module in network.modules() if type(module).__name__ in blocks][::-1]
    for module in (*inside_out, network):
        # the outermost too: it would keep old weights after a forward pass that has no backward pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return network
