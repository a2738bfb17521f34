"""The main job: `accelerate launch erase_sd/train.py --concept cat --model pocket`. Parse, call erase, exit code."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # run as a file: its folder would hide real modules
    sys.path[0] = os.path.dirname(sys.path[0])
elif not __package__:  # python -P puts nothing there
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from erase_sd import export
from erase_sd.api import carry_out
from erase_sd.common.cli import parse, peek, quiet, run_main
from erase_sd.common.files import slug
from erase_sd.common.processes import accelerator, best_precision
from erase_sd.denoising.card import rates, swap_in_snippet
from erase_sd.denoising.concept import resolve
from erase_sd.dry_run import describe
from erase_sd.methods import METHODS
from erase_sd.models.foreign import Artefacts, identity
from erase_sd.models.pipeline import load
from erase_sd.plan import Plan, groups, make, values
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.settings import SD_V1
from prompts import called


def program() -> NoReturn:
    """Run the command `erase-sd`: exit with its code, a user's mistake being one sentence and code 2.

    `erase-sd export RUN ...` is `python -m erase_sd.export RUN ...`.
    """
    if sys.argv[1:2] == ["export"]:
        run_main(partial(export.main, sys.argv[2:]))
    run_main(main)


def main(argv: list[str] | None = None) -> int:
    """Carry out the job that the arguments describe; returns the exit code."""
    if argv is None:
        argv = sys.argv[1:]
    method = peek(argv, "method", "scissorhands")
    classes = groups(method)
    model = peek(argv, "model", SD_V1, ("pretrained_model_name_or_path",))
    usual = values(method, model, peek(argv, "preset"))
    text = f"Make a diffusers model unable to draw a concept. Methods: {', '.join(METHODS)}."
    given = parse(argv, prog="erase-sd", description=text, preset=usual, **classes)
    asked = {}
    for group in given.values():
        asked |= group
    quiet()
    return _run(_with_folder(make(**asked)))


def _with_folder(plan: Plan) -> Plan:
    """Return the plan with its default folder, runs/<concept>-<method>."""
    folder = plan.job.output_dir or str(
        Path("runs") / f"{slug(' '.join(map(called, plan.job.concept)))}-{plan.job.method}"
    )
    return plan._replace(job=replace(plan.job, output_dir=folder))


def _run(plan: Plan) -> int:
    """Load the model, erase, and print the scores and how to use the result."""
    model = str(POCKET) if plan.job.model == "pocket" else plan.job.model
    job = plan.job
    identity(Artefacts(job.unet, job.text_encoder, job.adapter))  # what is not there is said before a model is loaded
    if plan.running.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(describe(plan, model))
        return 0
    resolve(plan.job, plan.sampling.resolution)  # a mistake in words need not wait until the model is loaded
    processes = accelerator(best_precision(plan.job.mixed_precision), plan.running.report_to, plan.job.output_dir)
    pipe = load(model, config=plan.job.model_config)
    record = carry_out(pipe, plan, processes, tell=print)
    if processes.is_main_process:
        print(summary(record, plan.job.output_dir))
        print(f"\nTo use it:\n\n{swap_in_snippet(pipe, plan.job.model, plan.job.output_dir, plan.job.model_config)}")
    processes.end_training()
    return 0


def summary(record: dict, folder: str) -> str:
    """Return the scores and where everything is, as the last lines of the job."""
    lines = [f"{folder}: unet/, run.json, README.md, before_after.png ({record['seconds']:.0f} s)"]
    for place, mib in record["peak_memory_mib"].items():
        share = mib * 2**20 / (4 * record["parameters"])  # of a small network the libraries' own memory tells nothing
        times = f", {share:.2f} x the network in fp32" if share < 20 else ""
        lines.append(f"{place + ' memory':<20} {mib / 1024:6.2f} GiB at its peak{times}")
    return "\n".join(lines + _measured(record["scores"] or {}))


def _measured(scores: dict) -> list[str]:
    """Return a line for every rate of scores.json, before and after."""
    measured = rates(scores)
    if not measured:
        return ["not measured: whether the concept is gone; README.md in the folder has the commands"]
    lines = []
    for name, before, after in measured:
        lines.append(f"{name:<20} {100 * before:6.1f} % -> {100 * after:6.1f} %")
    if "concept" in scores:
        lines.append(f"concept pictures that show nothing of its kind: {100 * scores['concept']['other_share']:.1f} %")
    return lines


if __name__ == "__main__":
    program()
