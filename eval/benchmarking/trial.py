"""One row of the benchmark: run the method as a user would, sample the exam with the result, evaluate by the oracle.

rows/<method>_<concept>_<seed>.json is all that has to be kept; features, samples, latents and runs are in .cache.
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

SHOWN = (2, 1)  # samples of a row in the grid: of the concept, and of everything else
JOB = ("-m", "erase_sd.train")
BATCH = 256  # images in a batch of the feature extractor


class Evaluation(NamedTuple):
    """Samples with the oracle's features and answers."""

    pixels: Tensor  # (N, H, W, 3) uint8
    features: Tensor  # (N, D) float32
    answers: list[Answer]


def finish(row: BenchmarkRow, folder: Path, keep: bool) -> str:
    """Carry out a row and write its result, the features first; return its file. Raises UserError if the job fails.

    `keep` leaves the run in the folder's .cache, 20 MB each.
    """
    questions = exam([part_named(row.concept)], *row.pictures, row.seed)
    before = original(questions, folder)
    run, record, after = None, {}, before
    if row.job:
        run, record = erase(row, folder)
        after = evaluate(sampled(questions, run))
        if not keep:
            shutil.rmtree(run)
    kept = retain_mask(questions)
    tensors = {"features": after.features[kept], "shown": after.pixels[_shown(kept)]}
    for name, x in tensors.items():
        tensors[name] = x.contiguous()
    write_atomic(features_file(row, folder), save(tensors))
    result = {"method": row.method, "concept": row.concept, "seed": row.seed, "key": row.key}
    result |= _rates(row, questions, after) | _drift(after, before, kept) | _costs(record)
    result |= {"config": row.config, "protocol": protocol() | {"pictures": row.pictures}}
    write_atomic(folder / "rows" / row.file, json.dumps(result, indent=2) + "\n")
    return row.file


def features_file(row: BenchmarkRow, folder: Path) -> Path:
    """Return the file of {"features": (N, D) of the retain samples, "shown": (n, H, W, 3) uint8 for the grid}."""
    return folder / ".cache" / "features" / f"{row.key[:32]}.safetensors"


def captions_shown(row: BenchmarkRow) -> list[tuple[bool, str]]:
    """Return (whether it asks for the concept, caption) of each of the row's samples in the grid."""
    questions = exam([part_named(row.concept)], *row.pictures, row.seed)
    found = []
    for i in _shown(retain_mask(questions)):
        found.append((questions[i].concept is not None, caption(questions[i].scene)))
    return found


def retain_mask(questions: list[Question]) -> Tensor:
    """Return (N,) bool: which questions do not name the concept."""
    return torch.tensor([q.concept is None for q in questions])


def _shown(kept: Tensor) -> list[int]:
    """Return the indices of the first samples of the concept and of everything else."""
    of_concept, of_rest = SHOWN
    return [*(~kept).nonzero()[:of_concept, 0].tolist(), *kept.nonzero()[:of_rest, 0].tolist()]


def erase(row: BenchmarkRow, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the run folder of the row's job and its record; a complete one is used again.

    Runs on the same training images share them in .cache beside the runs. Raises UserError if the job fails.
    """
    run = folder / ".cache" / "runs" / row.key[:16]
    status = run / "status.json"
    if run.exists() and not (status.is_file() and json.loads(status.read_text())["state"] == "complete"):
        shutil.rmtree(run)  # to begin anew: the time of a run that was killed is not whole
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *JOB, *row.job, "--output_dir", str(run)]
    with open(log, "w") as out:  # as accelerate's launcher does, the variable makes the job end with its parent
        env = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        lines = log.read_text().strip().splitlines() or ["it said nothing"]
        text = f"{row.method} on {row.concept}, seed {row.seed}, ended with exit code {done.returncode} ({lines[-1]})"
        raise UserError(f"{text}: see {log}")
    log.unlink()
    return run, json.loads((run / "run.json").read_text())


def sampled(questions: list[Question], run: Path | None) -> Tensor:
    """Return (N, H, W, 3) uint8: a sample of the embedded model for each question, with a run's UNet if there is one.

    The sampler, its steps and guidance are the embedded model's own.
    """
    pipe = load(str(FOLDER), unet=run and str(run))
    prompts, seeds = [], []
    for question in questions:
        prompts.append(caption(question.scene))
        seeds.append(question.seed)
    images = sample(pipe, prompts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=64)
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))


def original(questions: list[Question], folder: Path) -> Evaluation:
    """Return the original model's samples, evaluated; they are sampled once and kept in .cache."""
    asked = [[q.seed, caption(q.scene)] for q in questions]
    name = digest([protocol(), asked])
    file = folder / ".cache" / "original" / f"{name[:32]}.safetensors"
    if not file.is_file():
        write_atomic(file, save({"pixels": sampled(questions, None)}))
    return evaluate(load_file(file)["pixels"])


@cache
def reference(concept: str, seed: int, n: int, folder: Path) -> Tensor:
    """Return (n, D) features of the original model's samples for a row's retain prompts, with other seeds."""
    return original(exam([part_named(concept)], 0, n, seed + REFERENCE), folder).features


@torch.no_grad()
def evaluate(pixels: Tensor) -> Evaluation:
    """Return samples (N, H, W, 3) uint8 with the oracle's features and answers."""
    images = _images(pixels)
    extractor = extractors.load(protocol()["features"])
    inputs = torch.stack([extractor.prepare(image) for image in images])
    features = torch.cat([extractor.images(batch) for batch in inputs.split(BATCH)])
    return Evaluation(pixels, features, oracle.name(oracle.load(), images))


def _images(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.numpy()) for x in pixels]


def _rates(row: BenchmarkRow, questions: list[Question], seen: Evaluation) -> dict[str, Any]:
    """Return UA, IRA and CRA as eval.concepts defines them, and the share of the concept's samples seen as "other"."""
    part = part_named(row.concept)
    kind, _ = part
    entries = []
    broken_images = 0
    for image in _images(seen.pixels):
        reason = broken(image)
        broken_images += bool(reason)
        entries.append(Entry(file="", broken=reason))
    scenes = [q.scene for q in questions]
    found = rates(Judged(entries=entries, scenes=scenes, answers=seen.answers, images=""), [part])
    asked, others = 0, 0
    for question, answer in zip(questions, seen.answers, strict=True):
        if question.concept:
            asked += 1
            others += answer[kind] == oracle.OTHER
    found["other_share"] = others / asked
    found["broken"] = broken_images
    found["n"] = len(entries)
    return found


def _drift(after: Evaluation, before: Evaluation, kept: Tensor) -> dict[str, float]:
    """Return how far the retain samples are from the original's of the same prompt and seed, broken ones included.

    "drift" is the mean of 1 - cosine of the features, "drift_rmse" that of the RMSE of the pixels, in levels of 255.
    """
    far = (1 - cosines(after.features[kept], before.features[kept])).clamp(min=0)  # rounding alone is below 0
    step = (after.pixels[kept].double() - before.pixels[kept].double()).square().mean((1, 2, 3)).sqrt()
    return {"drift": far.mean().item(), "drift_rmse": step.mean().item()}


def _costs(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the method took: seconds, peak memory in MiB; nothing for the original model."""
    if not record:
        return {"seconds": 0.0, "peak_memory_mib": None, "reinitialised": 0, "environment": None}
    return {
        "peak_memory_mib": record["peak_memory_mib"]["host"],
        "seconds": record["method_seconds"],
        "reinitialised": record["reinitialised"],
        "environment": record["environment"],
    }
