"""What is measured on the network of a finished run, once: relearn time, and the confidences that LiRA compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from classification.data.partition import Parts, partition
from classification.metrics.accuracy import accuracy, logits
from classification.metrics.lira import confidence
from classification.metrics.relearn import relearn
from classification.plan import ClassifierPlan
from classification.run.jobs import network, original_of, recipe_of, restore, unlearn
from erase_sd.common.files import write_atomic
from erase_sd.common.processes import accelerator

FILE = "afterwards.json"
LOGITS = "forget_logits.safetensors"
RELEARN = {"lr": 1e-3, "batch_size": 64, "max_epochs": 200}  # alike for all methods, else their own lr decided


def measured(plan: ClassifierPlan, relearning: bool) -> dict[str, Any]:
    """Return the plan's record with `confidence`, one number per example of D_f, and, if asked for, `relearn`.

    The logits of D_f lie beside it, see `forget_logits`. `relearn` is in epochs, None where RELEARN's did not suffice.
    Raises UserError as `jobs.unlearn` does.
    """
    accel = accelerator(None)
    record = unlearn(plan, accel)
    file = Path(record["folder"]) / FILE
    found = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != RELEARN:
        found = {"settings": RELEARN}
    wanted = ["confidence", "relearn"] if relearning else ["confidence"]
    if not found.keys() >= set(wanted) or not file.with_name(LOGITS).is_file():
        _measure(plan, record, relearning, accel.device, found)
        write_atomic(file, json.dumps(found))
    return record | {key: found[key] for key in (*wanted, "settings")}


def _measure(
    plan: ClassifierPlan, record: dict[str, Any], relearning: bool, device: torch.device, found: dict[str, Any]
) -> None:
    """Put `confidence` and, if asked for, `relearn` into `found`."""
    parts = partition(plan.data)
    forget = parts.forget
    model = finished(plan, parts, record["folder"]).to(device)
    outputs = logits(model, forget, device=device)
    write_atomic(Path(record["folder"]) / LOGITS, save({"logits": outputs}))
    found["confidence"] = confidence(outputs, forget.labels).tolist()
    if relearning:
        raw = original_of(plan, recipe_of(plan.data, plan.job.raw), accelerator(None))
        original = finished(plan, parts, str(raw)).to(device)
        target = accuracy(logits(original, forget, device=device), forget.labels)
        found["relearn"] = relearn(model, forget, target=target, seed=plan.job.seed, device=device, **RELEARN)


def forget_logits(record: dict[str, Any]) -> torch.Tensor:
    """Return the logits (n_f, K) of a measured run's forget set."""
    return load_file(Path(record["folder"]) / LOGITS)["logits"]


def finished(plan: ClassifierPlan, parts: Parts, folder: str) -> nn.Module:
    """Return the network that a run left in its folder."""
    recipe = recipe_of(plan.data, plan.job.raw)
    return restore(network(parts.dataset, recipe, plan.job.train_seed, empty=True), Path(folder))
