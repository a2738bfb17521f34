"""Train the network that is to forget: `accelerate launch classification/train.py --dataset cifar10 --data_dir D`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # run as a file: its folder would hide real modules
    sys.path[0] = os.path.dirname(sys.path[0])
elif not __package__:  # python -P puts nothing there
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from classification.plan import ClassifierTraining, training
from classification.run.jobs import train
from classification.settings import Data
from erase_sd.common.cli import filled, knob, parse, quiet, run_main
from erase_sd.common.processes import accelerator


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Which network of many, and where it goes."""

    train_seed: int = knob(0, "seed of the weights and of the order of the data")
    output_dir: str = knob("runs/classification", "folder of all runs, each in a folder of its own")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = knob(
        None, "autocast; by default accelerate's setting; fp16 is refused"
    )


def main(argv: list[str] | None = None) -> int:
    """Train on everything but the validation set; the same command again resumes or costs nothing."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Train a classifier on all of its data."
    given = parse(argv, prog="train", description=text, run=TrainRun, data=Data, training=ClassifierTraining)
    data, place = filled(Data, given["data"]), filled(TrainRun, given["run"])
    recipe = replace(training(data.dataset), **given["training"])
    quiet()
    accel = accelerator(place.mixed_precision)
    folder = train(data, recipe, place.train_seed, Path(place.output_dir), accel)
    if accel.is_main_process:
        print(f"{folder}: model.safetensors, run.json")
    return 0


if __name__ == "__main__":
    run_main(main)
