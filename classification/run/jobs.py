"""Runs: train the original model, make it forget, measure the result. Each in a folder of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

from classification.data.dataset import Dataset
from classification.data.partition import Parts, dataset_of, partition, pool_of
from classification.metrics.scores import scores
from classification.models.networks import build
from classification.plan import ClassifierPlan, ClassifierTraining, make, training
from classification.settings import ClassifierSettings, Data
from classification.task import ClassificationTask
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, write_atomic
from erase_sd.common.processes import accelerator, workers
from erase_sd.methods.finetune import FineTune
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.loop import execute
from erase_sd.run.record import run_record

WEIGHTS = "model.safetensors"


def train(data: Data, recipe: ClassifierTraining, seed: int, root: Path, accel: Accelerator) -> Path:
    """Return the folder of the network trained on everything but the validation set; it is trained if need be."""
    dataset = dataset_of(data)
    pool, _ = pool_of(dataset, data.split_seed)
    config = {"dataset": data.dataset, "split_seed": data.split_seed, "train_seed": seed, **dataclasses.asdict(recipe)}
    folder = root / data.dataset / f"raw-{digest(config)[:8]}"
    nothing = pool.take(torch.arange(0))
    settings = ClassifierSettings(batch_size=recipe.batch_size)
    task = ClassificationTask(network(dataset, recipe, seed), dataset, nothing, pool, settings, seed, accel)
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(FineTune)}  # training is FT
    method = lasting(FineTune(**own), recipe.epochs, task, "retain")
    carry_out(method, task, folder, config, every=1000, judge=None)
    return folder


def network(dataset: Dataset, recipe: ClassifierTraining, seed: int) -> nn.Module:
    """Return the recipe's network with fresh weights."""
    return build(
        recipe.model,
        classes=len(dataset.classes),
        channels=dataset.train.pixels.shape[1],
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
        weights=recipe.weights,
    )


def lasting(method: Any, epochs: float, task: ClassificationTask, name: str) -> Any:
    """Return the method with as many steps as walk so often through the forget or the retain set, one at least."""
    return replace(method, steps=max(1, math.ceil(epochs * task.epoch(name))))


def unlearn(plan: ClassifierPlan, accel: Accelerator) -> dict[str, Any]:
    """Carry out a plan and return its record; a complete run costs no work. Raises UserError as the parts do."""
    job, root = plan.job, Path(plan.job.output_dir)
    parts = partition(plan.data)
    recipe = training(plan.data.dataset)
    original = Path(job.raw) if job.raw else train(plan.data, recipe, job.train_seed, root, accel)
    config = plan.config()
    if job.method == "retrain":
        model = network(parts.dataset, recipe, job.seed)
        config["raw"] = None
    else:
        model = restore(network(parts.dataset, recipe, job.train_seed), original)
        config["raw"] = file_digest(original / WEIGHTS)
    task = ClassificationTask(model, parts.dataset, parts.forget, parts.retain, plan.losses, job.seed, accel)
    method = plan.method
    if job.epochs is not None:
        method = lasting(method, job.epochs, task, plan.walked())
    folder = root / plan.data.dataset / f"{job.method}-{digest(config)[:10]}"
    ids = {"forget_ids": list(parts.forget.ids), "raw_folder": str(original)}
    return carry_out(method, task, folder, config, every=job.checkpointing_steps, judge=parts, **ids)


def carry_out(
    method: Any, task: ClassificationTask, folder: Path, config: dict, *, every: int, judge: Parts | None, **more: Any
) -> dict[str, Any]:
    """Run a method in its folder, resuming it, and leave the weights and the record there.

    `judge` has the data by which the result is scored; `more` is added to the record.
    """
    start = time.monotonic()
    weights, main = task.model.state_dict(), task.accelerator.is_main_process
    resumed = (folder / "checkpoints").is_dir()  # then `seconds` is not the whole time
    more["folder"] = str(folder)  # where it is now: runs may be moved

    def finish(progress: Progress) -> dict[str, Any]:
        measured = scores(task.model, judge, task.accelerator.device) if judge else None
        if main:
            tensors = {}
            for name, x in weights.items():
                tensors[name] = x.detach().cpu().contiguous()
            write_atomic(folder / WEIGHTS, save(tensors))
        return run_record(
            config,
            seed=task.seed,
            base=config.get("model", str(more.get("raw_folder"))),
            base_hash=str(config.get("raw")),
            seconds=time.monotonic() - start,
            trace=progress.trace,
            scores=measured,
            resumed=resumed,
            samples=task.samples,
            reinitialised=sum(progress.changed.values()),
            **more,
        )

    record = execute(
        method,
        nullcontext((task, weights)),
        RunFolder(folder, config, writes=main),
        finish,
        wait=task.accelerator.wait_for_everyone,
        every=every,
        description=config.get("method", "train"),
    )
    return record | more


def restore(model: nn.Module, folder: Path) -> nn.Module:
    """Put the weights of a run into the model and return it. Raises UserError if there are none that fit."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}: give the folder of a finished run")
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise UserError(f"{file} does not fit {type(model).__name__}: {str(error).splitlines()[0]}") from error
    return model


def unlearned(plan: ClassifierPlan) -> dict[str, Any]:
    """Return the record of the plan's run, which is carried out if it is not there yet."""
    return unlearn(plan, accelerator(None))


def run_all(
    jobs: Iterable[dict[str, Any]],
    processes: int,
    description: str,
    work: Callable[[ClassifierPlan], dict[str, Any]] = unlearned,
) -> list[dict[str, Any]]:
    """Return what `work` returns for every job, `classification.plan.make`'s values, in their order.

    Finished runs cost little. A run's folder belongs to one process at a time: jobs that come to the same run are
    carried out once, and one job of each network that is to forget goes ahead, to train it. Raises UserError as `make`
    and `work` do.
    """
    names: list[str] = []
    runs: dict[str, ClassifierPlan] = {}
    ahead: dict[tuple, ClassifierPlan] = {}
    for job in jobs:
        plan = make(**job)
        name = digest([plan.config(), plan.job.output_dir])
        names.append(name)
        runs[name] = plan
        ahead[plan.data.dataset, plan.data.split_seed, plan.job.train_seed, plan.job.raw] = plan
    done: dict[str, dict[str, Any]] = {}
    with workers(processes) as pool, tqdm(total=len(runs), desc=description, unit="run") as bar:
        list(pool.map(work, ahead.values()))
        for name, record in zip(runs, pool.map(work, runs.values()), strict=True):
            done[name] = record
            bar.update()
    return [done[name] for name in names]
