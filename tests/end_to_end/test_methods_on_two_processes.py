"""Every method on two processes against one. This file is also the script that torchrun starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase_sd import erase
from erase_sd.common.cli import names
from erase_sd.methods import METHODS
from erase_sd.models import guidance
from erase_sd.models.pipeline import load
from erase_sd.plan import groups

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
QUICK = {"steps": 2, "batch_size": 4, "sensitivity_batches": 1, "fisher_batches": 1, "warmup_steps": 0}
QUICK |= {"forget_images": 4, "retain_images": 4, "sample_steps": 2, "picture_steps": 1}


def erased(folder: str, method: str) -> dict[str, Tensor]:
    """The weights after a few steps of a method, or what the network carries instead."""
    known = set().union(*map(names, groups(method).values()))
    pipe = load(folder)
    erase(pipe, "cat", method, **{name: value for name, value in QUICK.items() if name in known})
    found = {name: x.detach().clone() for name, x in pipe.unet.state_dict().items()}
    if carried := guidance.carried(pipe.unet):
        found |= carried.text
    return found


@pytest.fixture(scope="module")
def two(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tiny_sd), str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_what_one_finds(two: dict, tiny_sd: Path, method: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    one, before = erased(str(tiny_sd), method), load(str(tiny_sd)).unet.state_dict()
    assert one.keys() == two[method].keys()
    moved = max(float((one[name] - x).abs().max()) for name, x in before.items())
    apart = torch.cat([(two[method][name] - x).abs().flatten() for name, x in one.items()])
    assert (moved > 0) == METHODS[method].trains
    # AdamW's first steps have the gradient's sign, and some are nearly zero
    assert (apart <= 0.01 * moved).float().mean() > 0.99


if __name__ == "__main__":
    model, out = sys.argv[1:]
    for word in METHODS:
        weights = erased(model, word)
        if os.environ["RANK"] == "0":
            save_file(weights, f"{out}/{word}.safetensors")
