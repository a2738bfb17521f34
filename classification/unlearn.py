"""Make a classifier forget: `accelerate launch classification/unlearn.py --dataset digits --method scissorhands`."""

from __future__ import annotations

import os
import sys

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # run as a file: its folder would hide real modules
    sys.path[0] = os.path.dirname(sys.path[0])
elif not __package__:  # python -P puts nothing there
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from classification.plan import groups, make
from classification.run.jobs import unlearn
from erase_sd.common.cli import parse, peek, quiet, run_main
from erase_sd.common.processes import accelerator

NAMES = {
    "acc_f": "accuracy on the forget set",
    "acc_r": "accuracy on the retain set",
    "acc_t": "accuracy on the test set",
    "mia": "forget set taken for unseen",
}


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, unlearn, and print the scores; the same command again costs nothing."""
    argv = sys.argv[1:] if argv is None else argv
    classes = groups(peek(argv, "method", "scissorhands"))
    given = parse(argv, prog="unlearn", description="Make a classifier forget some of its training data.", **classes)
    values = {}
    for part in given.values():
        values |= part
    plan = make(**values)
    quiet()
    accel = accelerator(plan.job.mixed_precision)
    record = unlearn(plan, accel)
    if accel.is_main_process:
        for name, text in NAMES.items():
            print(f"{text:<28} {100 * record['scores'][name]:6.2f} %")
        print(f"{record['folder']}: model.safetensors, run.json ({record['seconds']:.1f} s)")
    return 0


if __name__ == "__main__":
    run_main(main)
