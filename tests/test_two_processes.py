"""The main job on two processes (torchrun, gloo): one folder, and the weights that one process finds."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).parents[1]
QUICK = (
    "--steps 3 --lr 1e-4 --batch_size 4 --sensitivity_batches 1 --forget_images 4 --retain_images 4 --sample_steps 2"
)


def run(tiny_sd: Path, folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, *launcher, str(ROOT / "erase_sd" / "train.py"), "--concept", "nudity"]
    command += ["--model", str(tiny_sd), "--output_dir", str(folder), *QUICK.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("To use it") == 1  # said once, by the first process
    return UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet").state_dict()


def test_two_processes_find_what_one_finds(tiny_sd: Path, tmp_path: Path):
    one = run(tiny_sd, tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = run(tiny_sd, tmp_path / "two", *torchrun)
    before = UNet2DConditionModel.from_pretrained(str(tiny_sd), subfolder="unet").state_dict()
    moved = max(float((one[name] - x).abs().max()) for name, x in before.items())
    apart = max(float((two[name] - x).abs().max()) for name, x in one.items())
    assert (
        moved > 1e-4 and apart < 0.1 * moved
    )  # AdamW's first steps have the gradient's sign, and some are nearly zero
    close = torch.cat([((two[name] - x).abs() < 1e-6).flatten() for name, x in one.items()])
    assert close.float().mean() > 0.99
