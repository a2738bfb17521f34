"""Train the network that is to forget: `accelerate launch classification/train.py --dataset cifar10 --data_dir D`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # run as a file: its folder would hide real modules
    sys.path[0] = os.path.dirname(sys.path[0])
elif not __package__:  # python -P puts nothing there
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from classification.knobs import Data
from classification.plan import Job, Training, training
from erase_sd.options import filled, parse
from erase_sd.process import run_main
from erase_sd.terminal import quiet


def main(argv: list[str] | None = None) -> int:
    """Train on everything but the validation set; the same command again resumes or costs nothing."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Train a classifier on all of its data."
    given = parse(argv, prog="train", description=text, job=Job, data=Data, training=Training)
    data, job = filled(Data, given["data"]), filled(Job, given["job"])
    recipe = replace(training(data.dataset), **given["training"])

    from pathlib import Path

    quiet()

    from classification.runs import train
    from erase_sd.devices import accelerator

    accel = accelerator(job.mixed_precision)
    folder = train(data, recipe, job.train_seed, Path(job.output_dir), accel)
    if accel.is_main_process:
        print(f"{folder}: model.safetensors, run.json")
    return 0


if __name__ == "__main__":
    run_main(main)
