"""One row of the benchmark: run the method as a user would, draw the exam with the result, have the oracle judge it.

rows/<method>_<concept>_<seed>.json is all that has to be kept; features, pictures, latents and runs are in .cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, write_atomic
from erase_sd.common.imaging import broken
from erase_sd.models.pipeline import load, sample
from erase_sd.pocket import FOLDER, oracle
from erase_sd.pocket.prompt_sets import Question, exam
from erase_sd.pocket.score import GUIDANCE, STEPS
from erase_sd.pocket.world import Answer, caption, part_named
from eval.benchmarking.rows import BenchmarkRow, protocol
from eval.benchmarking.suites import REFERENCE
from eval.features import extractors
from eval.features.distances import cosines
from eval.images.folder import Entry
from eval.judges.oracle import Judged, rates

SHOWN = (2, 1)  # pictures of a row in the grid: of the concept, and of everything else
JOB = FOLDER.parents[1] / "train.py"


class Seen(NamedTuple):
    """Pictures as the judge sees them."""

    pixels: Tensor  # (N, H, W, 3) uint8
    features: Tensor  # (N, D) float32
    answers: list[Answer]


def finish(row: BenchmarkRow, folder: Path, keep: bool) -> str:
    """Carry out a row and write its result, the features first; returns its file. Raises UserError if the job fails.

    `keep` leaves the run in the folder's .cache, 20 MB each.
    """
    questions = exam([part_named(row.concept)], *row.pictures, row.seed)
    before = original(questions, folder)
    run, record = erased(row, folder) if row.job else (None, {})
    after = judged(drawn(questions, run)) if run else before
    if run and not keep:
        shutil.rmtree(run)
    kept = torch.tensor([q.concept is None for q in questions])
    tensors = {"features": after.features[kept], "shown": after.pixels[_places(kept)]}
    write_atomic(features_file(row, folder), save({name: x.contiguous() for name, x in tensors.items()}))
    result = {"method": row.method, "concept": row.concept, "seed": row.seed, "key": row.key}
    result |= _rates(row, questions, after) | _drift(after, before, kept) | _costs(record)
    result |= {"config": row.config, "protocol": protocol() | {"pictures": row.pictures}}
    write_atomic(folder / "rows" / row.file, json.dumps(result, indent=2) + "\n")
    return row.file


def features_file(row: BenchmarkRow, folder: Path) -> Path:
    """{"features": (N, D) of the retain pictures, "shown": (n, H, W, 3) uint8 for the grid}."""
    return folder / ".cache" / "features" / f"{row.key[:32]}.safetensors"


def questions_shown(row: BenchmarkRow) -> list[str]:
    """The captions of the pictures in the grid."""
    questions = exam([part_named(row.concept)], *row.pictures, row.seed)
    return [caption(questions[i].scene) for i in _places(torch.tensor([q.concept is None for q in questions]))]


def _places(kept: Tensor) -> list[int]:
    """The first pictures of the concept and of everything else."""
    return [*(~kept).nonzero()[: SHOWN[0], 0].tolist(), *kept.nonzero()[: SHOWN[1], 0].tolist()]


def erased(row: BenchmarkRow, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The run of the row's job, and its record. Runs of the same pictures share them in .cache beside the runs."""
    run = folder / ".cache" / "runs" / row.key[:16]
    status = run / "status.json"
    if run.exists() and not (status.is_file() and json.loads(status.read_text())["state"] == "complete"):
        shutil.rmtree(run)  # to begin anew: the time of a run that was killed is not whole
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(JOB), *row.job, "--output_dir", str(run)]
    with open(log, "w") as out:  # as accelerate's launcher does, the variable makes the job end with its parent
        env = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        text = f"{row.method} on {row.concept}, seed {row.seed}, ended with exit code {done.returncode} ({last})"
        raise UserError(f"{text}: see {log}")
    log.unlink()
    return run, json.loads((run / "run.json").read_text())


def drawn(questions: list[Question], run: Path | None) -> Tensor:
    """(N, H, W, 3) uint8: the answers of the pocket model, with the UNet of a run if there is one."""
    images = sample(
        load(str(FOLDER), unet=run and str(run)),
        [caption(q.scene) for q in questions],
        [q.seed for q in questions],
        steps=STEPS,
        guidance=GUIDANCE,
        batch_size=64,
    )
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))


def original(questions: list[Question], folder: Path) -> Seen:
    """The unerased model's pictures, drawn once."""
    name = digest([protocol(), [[q.seed, caption(q.scene)] for q in questions]])
    file = folder / ".cache" / "original" / f"{name[:32]}.safetensors"
    if not file.is_file():
        write_atomic(file, save({"pixels": drawn(questions, None)}))
    return judged(load_file(file)["pixels"])


@cache
def reference(concept: str, seed: int, n: int, folder: Path) -> Tensor:
    """(n, D) features of the unerased model's pictures of a row's retain prompts, drawn from other seeds."""
    return original(exam([part_named(concept)], 0, n, seed + REFERENCE), folder).features


@torch.no_grad()
def judged(pixels: Tensor) -> Seen:
    """What the judge sees."""
    images, extractor = _images(pixels), extractors.load(protocol()["features"])
    x = torch.stack([extractor.prepare(image) for image in images])
    return Seen(
        pixels, torch.cat([extractor.images(part) for part in x.split(256)]), oracle.name(oracle.load(), images)
    )


def _images(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.numpy()) for x in pixels]


def _rates(row: BenchmarkRow, questions: list[Question], seen: Seen) -> dict[str, Any]:
    """UA, IRA and CRA as eval.concepts defines them, and what became of the concept's pictures."""
    entries = [Entry(file="", broken=broken(image)) for image in _images(seen.pixels)]
    scenes, part = [q.scene for q in questions], part_named(row.concept)
    found = rates(Judged(entries=entries, scenes=scenes, answers=seen.answers, images=""), [part])
    asked = [answer[part[0]] for q, answer in zip(questions, seen.answers, strict=True) if q.concept]
    found["other_share"] = sum(word == oracle.OTHER for word in asked) / len(asked)
    return found | {"broken": sum(bool(entry.broken) for entry in entries), "n": len(entries)}


def _drift(after: Seen, before: Seen, kept: Tensor) -> dict[str, float]:
    """How far the retain pictures moved from the original's of the same prompt and seed, broken ones included."""
    far = (1 - cosines(after.features[kept], before.features[kept])).clamp(min=0)  # rounding alone is below 0
    step = (after.pixels[kept].double() - before.pixels[kept].double()).square().mean((1, 2, 3)).sqrt()
    return {"drift": far.mean().item(), "drift_rmse": step.mean().item()}


def _costs(record: dict[str, Any]) -> dict[str, Any]:
    """What the method took; nothing for the original model."""
    if not record:
        return {"seconds": 0.0, "peak_memory_mib": None, "reinitialised": 0, "environment": None}
    memory = {"peak_memory_mib": record["peak_memory_mib"]["host"]}
    return memory | {"seconds": record["method_seconds"]} | {k: record[k] for k in ("reinitialised", "environment")}
