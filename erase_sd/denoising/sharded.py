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
from erase_sd.denoising.task import DenoisingTask

CARRIERS = {torch.int16: torch.float16}  # neither gloo nor NCCL knows int16, which is only carried, bit for bit


def wanted(accelerator: Accelerator, fsdp: bool) -> bool:
    """Whether to shard: asked for here or in accelerate's configuration, and there are processes to share.

    Raises UserError for version 1 of FSDP, whose flat parameters know neither names nor shapes.
    """
    configured = accelerator.distributed_type == DistributedType.FSDP
    if configured and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("fsdp_version 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    return (fsdp or configured) and accelerator.num_processes > 1


class Sharded(nn.Module):
    """A copy of a network of which this process holds the rows that torch.chunk gives its rank, perhaps none.

    `network` computes like the whole one; `local` are this process's rows, plain parameters by name.
    """

    def __init__(self, network: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.device, self.dtype = mesh, torch.device(mesh.device_type), network.dtype
        self.network = _divide(copy.deepcopy(network), mesh)
        self.shards: dict[str, DTensor] = dict(self.network.named_parameters())
        self.local = {name: nn.Parameter(p.detach().to_local(), p.requires_grad) for name, p in self.shards.items()}
        self._local = nn.ParameterList(self.local.values())  # so that parameters() has them

    def hand_over(self) -> None:
        """Add the gradients that a backward pass left on the shards to those of the local parameters."""
        for name, shard in self.shards.items():
            if shard.grad is not None:
                g, p, shard.grad = shard.grad.to_local(), self.local[name], None
                p.grad = g if p.grad is None else p.grad.add_(g)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def before(self, x: Tensor) -> Tensor:
        """Sum over the lower ranks."""
        mine = x.to(self.device).contiguous()
        everyone = [torch.empty_like(mine) for _ in range(self.mesh.size())]
        dist.all_gather(everyone, mine)
        return sum(everyone[: self.mesh.get_rank()], torch.zeros_like(mine)).to(x.device)

    def whole(self, name: str, x: Tensor) -> Tensor:
        """A parameter's tensor, on the CPU, from the rows of all ranks; `x` itself where it is none, such as a count.

        `name` is a parameter's, perhaps beside other words: <parameter>/<slot>. Every rank has to ask.
        """
        shard = self._owner(name)
        if shard is None or x.shape != shard.to_local().shape:
            return x.cpu()
        bits = x.view(CARRIERS.get(x.dtype, x.dtype)).to(self.device)
        sizes = {"shape": shard.shape, "stride": shard.stride()}
        rows = DTensor.from_local(bits, self.mesh, shard.placements, run_check=False, **sizes)
        return rows.full_tensor().cpu().view(x.dtype)

    def mine(self, name: str, x: Tensor) -> Tensor:
        """This rank's rows of what `whole` returned."""
        shard = self._owner(name)
        if shard is None or x.shape != shard.shape:
            return x
        rows = -(-len(x) // self.mesh.size())
        return x[rows * self.mesh.get_rank() :][:rows].clone()

    def _owner(self, name: str) -> DTensor | None:
        return next((self.shards[part] for part in name.split("/") if part in self.shards), None)


def _divide(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The network itself, sharded block by block, so that only a block's parameters are whole at a time."""
    blocks = set(network._no_split_modules or ())
    inside_out = [module for module in network.modules() if type(module).__name__ in blocks][::-1]
    for module in (*inside_out, network):
        # the outermost too: it would keep old weights after a forward pass that has no backward pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return network


class ShardedTask(DenoisingTask):
    """The pipe's own network waits on the CPU, and takes the result in `assemble`."""

    model: Sharded

    def _prepare(self) -> None:
        self.assembled: nn.Module = self.model.to("cpu")
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        if self.knobs.anchor_model == "original":
            self.original = _divide(self._frozen_copy(), mesh)
        self.model = Sharded(self.assembled, mesh)
        groups = self._trainable, self._trimmable, self._ranked
        self._trainable, self._trimmable, self._ranked = ({n: self.model.local[n] for n in group} for group in groups)

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """The network's answer in the precision that accelerate was given."""
        with self.accelerator.autocast():
            return self.model.network(*inputs, **more)

    def assemble(self) -> None:
        """Copy the shards of all ranks into the pipe's own network; every rank has to."""
        for name, p in self.assembled.named_parameters():
            p.data.copy_(self.model.whole(name, self.model.local[name].detach()))

    def release(self) -> None:
        """The pipe's own network is on the device again, and the shards are not."""
        self.assembled.to(self.accelerator.device).requires_grad_(False)
        del self.model, self.original

    def _alone(self) -> AbstractContextManager:
        return nullcontext()  # whole gradients would have to be kept until the last part

    def _differentiate(self, loss: Tensor) -> None:
        super()._differentiate(loss)
        self.model.hand_over()

    def total(self, x: Tensor) -> Tensor:
        """Sum over the shards."""
        return self.model.total(x)

    def before(self, x: Tensor) -> Tensor:
        """Sum over the lower ranks' shards."""
        return self.model.before(x)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main process, which writes them; nothing on the others."""
        found = ((name, self.model.whole(name, x.detach())) for name, x in tensors.items())
        main = self.accelerator.is_main_process
        return {name: x for name, x in found if main}

    def mine(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows."""
        return {name: self.model.mine(name, x) for name, x in tensors.items()}
