"""Runs: train the original model, make it forget, measure the result. Each in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
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
from classification.data.partition import dataset_of, fingerprint_of, partition, pool_of
from classification.methods import acts
from classification.metrics.scores import scores
from classification.models.networks import build
from classification.plan import ClassifierPlan, ClassifierTraining, make, training
from classification.settings import ClassifierSettings, Data
from classification.task import ClassificationTask
from erase_sd.common.cli import filled, names
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, write_atomic
from erase_sd.common.processes import accelerator, workers
from erase_sd.methods.finetune import FineTune
from erase_sd.run.folder import CONFIG, Progress, RunFolder
from erase_sd.run.loop import execute
from erase_sd.run.record import run_record

WEIGHTS = "model.safetensors"


def train(data: Data, recipe: ClassifierTraining, seed: int, root: Path, accel: Accelerator) -> Path:
    """Return the folder of the network trained on everything but the validation set; it is trained if need be."""
    dataset = dataset_of(data)
    pool, _ = pool_of(dataset, data.split_seed)
    folder, config = raw_run(data, recipe, seed, root)
    nothing = pool.take(torch.arange(0))
    settings = ClassifierSettings(batch_size=recipe.batch_size)
    task = ClassificationTask(network(dataset, recipe, seed), dataset, nothing, pool, settings, seed, accel)
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(FineTune)}  # training is FT
    method = lasting(FineTune(**own), recipe.epochs, task, "retain")
    carry_out(method, task, folder, config, every=1000, measure=no_scores)
    return folder


def raw_run(data: Data, recipe: ClassifierTraining, seed: int, root: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the configuration of the network that this recipe trains, be it trained or not."""
    config = {
        "dataset": data.dataset,
        "data_digest": fingerprint_of(data),
        "split_seed": data.split_seed,
        "train_seed": seed,
        **dataclasses.asdict(recipe),
    }
    return root / data.dataset / f"raw-{digest(config)[:8]}", config


def recipe_of(data: Data, raw: str | None) -> ClassifierTraining:
    """Return how the original model was trained: as its folder tells, by the data set's recipe where it does not.

    The folder may be that of a run that unlearned already: then its own original model's counts. Raises UserError for
    a folder of other data, or of another validation split, whose forget set it never saw, and for a damaged one.
    """
    file = Path(raw or "") / CONFIG
    if raw is None or not file.is_file():
        return training(data.dataset)
    config = _read(file)
    known = config.get("data_digest", fingerprint_of(data))  # older folders do not say
    if config.get("dataset") != data.dataset or known != fingerprint_of(data):
        raise UserError(f"--raw {raw} was trained on other data ({config.get('dataset')}): give its own --dataset")
    if config["split_seed"] != data.split_seed and not data.authors_split:
        raise UserError(
            f"--raw {raw} never saw some of what is to be forgotten: give its --split_seed {config['split_seed']}"
        )
    if "method" in config:
        return recipe_of(data, _read(file.with_name("run.json"))["raw_folder"])
    values = {}
    for name in names(ClassifierTraining):
        value = config[name]
        values[name] = tuple(value) if isinstance(value, list) else value
    return filled(ClassifierTraining, values)


def _read(file: Path) -> dict[str, Any]:
    """Return the dict in a file of a run's folder. Raises UserError for a damaged or missing one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): give the folder of a finished run") from error


def network(dataset: Dataset, recipe: ClassifierTraining, seed: int, empty: bool = False) -> nn.Module:
    """Return the recipe's network with fresh weights, or one that is about to get others."""
    return build(
        recipe.model,
        classes=len(dataset.classes),
        channels=dataset.train.pixels.shape[1],
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
        weights=recipe.weights,
        empty=empty,
    )


def lasting(method: Any, epochs: float, task: ClassificationTask, name: str, share: float = 1.0) -> Any:
    """Return the method with as many steps as walk so often through a set, see `task.epoch`; one at least."""
    return replace(method, steps=max(1, math.ceil(epochs * task.epoch(name, share))))


def unlearn(plan: ClassifierPlan, accel: Accelerator) -> dict[str, Any]:
    """Carry out a plan and return its record; a complete run costs no work. Raises UserError as the parts do."""
    job = plan.job
    parts = partition(plan.data)
    recipe = recipe_of(plan.data, job.raw)
    config = plan.config() | {"data_digest": fingerprint_of(plan.data)}
    if job.method == "retrain":  # it needs no original model: the folder is where that is or would be
        original = Path(job.raw) if job.raw else raw_run(plan.data, recipe, job.train_seed, Path(job.output_dir))[0]
        model = network(parts.dataset, recipe, job.seed)
        config |= {"raw": None, "model": recipe.model, "weights": recipe.weights}
    else:
        original = original_of(plan, recipe, accel)
        model = restore(network(parts.dataset, recipe, job.train_seed, empty=True), original)
        config["raw"] = file_digest(original / WEIGHTS)
    task = ClassificationTask(model, parts.dataset, parts.forget, parts.retain, plan.losses, job.seed, accel)
    task.unseen = parts.val
    method = plan.method
    if job.epochs is not None:
        method = lasting(method, job.epochs, task, plan.walked(), plan.retain_share())

    def measure(trace: list[dict]) -> dict[str, Any]:
        return {"scores": scores(task.model, parts, accel.device, plan.scoring), "acted": acted(method, task, trace)}

    folder = Path(job.output_dir) / plan.data.dataset / f"{job.method}-{digest(config)[:10]}"
    about = {"forget_ids": list(parts.forget.ids), "raw_folder": str(original)}
    if parts.dataset.labelled_by:
        about["labelled_by"] = parts.dataset.labelled_by
    return carry_out(method, task, folder, config, every=job.checkpointing_steps, measure=measure, **about)


def original_of(plan: ClassifierPlan, recipe: ClassifierTraining, accel: Accelerator) -> Path:
    """Return the folder of the original model, which is trained if none is given and it is not there yet."""
    job = plan.job
    return Path(job.raw) if job.raw else train(plan.data, recipe, job.train_seed, Path(job.output_dir), accel)


def acted(method: Any, task: ClassificationTask, trace: list[dict]) -> dict[str, int]:
    """Return in how many of the steps the forget set was part of the update, and in how many a projection bit."""
    forget = sum(acts(method, task, record) for record in trace)
    projected = sum(bool(record.get("bit")) for record in trace)
    return {"steps": len(trace), "forget": forget, "projected": projected}


def no_scores(trace: list[dict]) -> dict[str, Any]:
    """Return no scores: those of the network that is to forget depend on what that will be."""
    return {"scores": None}


def carry_out(
    method: Any,
    task: ClassificationTask,
    folder: Path,
    config: dict,
    *,
    every: int,
    measure: Callable[[list[dict]], dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Run a method in its folder, resuming it, and leave the weights and the record there.

    `measure(trace)` returns what is measured on the result, for the record; `more` is added to it.
    """
    start = time.monotonic()
    weights, main = task.model.state_dict(), task.accelerator.is_main_process
    resumed = (folder / "checkpoints").is_dir()  # then `seconds` is not the whole time
    more["folder"] = str(folder)  # where it is now: runs may be moved

    def finish(progress: Progress) -> dict[str, Any]:
        measured = measure(progress.trace)
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
            resumed=resumed,
            samples=task.samples,
            reinitialised=sum(progress.changed.values()),
            **measured,
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
    keys: list[str] = []
    runs: dict[str, ClassifierPlan] = {}
    ahead: dict[tuple, ClassifierPlan] = {}
    for job in jobs:
        plan = make(**job)
        name = digest([plan.config(), plan.job.output_dir, plan.data.data_dir, plan.job.raw])
        keys.append(name)
        runs[name] = plan
        if plan.job.method != "retrain":  # which trains none
            ahead[plan.data.dataset, plan.data.split_seed, plan.job.train_seed, plan.job.raw] = plan
    done: dict[str, dict[str, Any]] = {}
    with workers(processes) as pool, tqdm(total=len(runs), desc=description, unit="run") as bar:
        list(pool.map(work, ahead.values()))
        for name, record in zip(runs, pool.map(work, runs.values()), strict=True):
            done[name] = record
            bar.update()
    return [done[name] for name in keys]
