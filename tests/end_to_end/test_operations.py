"""A repair step costs what its objective needs: operations counted on SD v1.4's shapes, through the repair itself.

Meta tensors have shapes and no values: where the loop asks for a number, it gets one.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from erase_sd.core.optimizers import OPTIMIZERS
from erase_sd.core.repair import Repair, repair
from erase_sd.denoising.task import DenoisingTask
from eval.timing.fakes import losses, samples

FORWARD, BACKWARD = 803.3e9, 2406.8e9 - 803.3e9  # of one sample at 512 pixels, measured independently
VALUES = (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__)
META = SimpleNamespace(
    device=torch.device("meta"),
    num_processes=1,
    process_index=0,
    mixed_precision="no",
    autocast=nullcontext,
    prepare_model=lambda model: model,
    backward=lambda loss: loss.backward(),
    reduce=lambda x, how: x,
)


class Ones(TorchFunctionMode):
    """Meta tensors whose values are asked for are full of ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in VALUES and args[0].is_meta:
            args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        return func(*args, **kwargs or {})


def counted(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch, **knobs: str) -> int:
    """Operations of one step of the repair, one sample of each set, latents of 64x64."""
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda theta, k: torch.optim.SGD(theta, lr=k.lr))  # meta has no fused one
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=unet, scheduler=PNDMScheduler(steps_offset=1), requires_safety_checker=False, **rest
    )
    task = DenoisingTask(pipe, samples(1, 64, 768), losses(1), 0, META)
    with Ones(), FlopCounterMode(display=False) as counter:
        next(repair(task, Repair(steps=1, **knobs)))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("objective", "constraint", "forwards", "backwards"),
    [
        pytest.param("ascent", "forget", 2, 2, marks=pytest.mark.slow),  # L_f, L_r
        # L_f, L_r, the concept's answer; the anchor's, which has no backward
        pytest.param("redirect", "forget", 4, 3, marks=pytest.mark.slow),
        ("redirect", "contrast", 5, 4),  # and L_f under the anchor's caption
    ],
)
def test_a_repair_step_computes_what_its_objective_needs(
    sd14_unet: UNet2DConditionModel,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    constraint: str,
    forwards: int,
    backwards: int,
) -> None:
    found = counted(sd14_unet, monkeypatch, objective=objective, constraint=constraint)
    assert found == pytest.approx(forwards * FORWARD + backwards * BACKWARD, rel=0.01)
