"""What is measured on the network of a finished run, once: relearn time, and the confidences that LiRA compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from classification.data.partition import Parts, partition
from classification.metrics.accuracy import accuracy, logits
from classification.metrics.lira import confidence
from classification.metrics.relearn import relearn
from classification.plan import ClassifierPlan, training
from classification.run.jobs import network, restore, unlearn
from erase_sd.common.files import write_atomic
from erase_sd.common.processes import accelerator

FILE = "afterwards.json"
RELEARN = {"lr": 1e-3, "batch_size": 64, "max_epochs": 200}  # alike for all methods, else their own lr decided


def measured(plan: ClassifierPlan, relearning: bool) -> dict[str, Any]:
    """The plan's record with `confidence`, one number per example of D_f, and, if asked for, `relearn` in epochs.

    `relearn` is None where RELEARN's epochs did not suffice. Raises UserError as `runs.unlearn` does.
    """
    accel = accelerator(None)
    record = unlearn(plan, accel)
    file = Path(record["folder"]) / FILE
    found = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != RELEARN:
        found = {"settings": RELEARN}
    wanted = {"confidence"} | ({"relearn"} if relearning else set())
    if wanted - found.keys():
        cut, device = partition(plan.data), accel.device
        model = finished(plan, cut, record["folder"]).to(device)
        answers = logits(model, cut.forget, device=device)
        found["confidence"] = confidence(answers, cut.forget.labels).tolist()
        if relearning:
            raw = finished(plan, cut, record["raw_folder"]).to(device)
            target = accuracy(logits(raw, cut.forget, device=device), cut.forget.labels)
            found["relearn"] = relearn(model, cut.forget, target=target, seed=plan.job.seed, device=device, **RELEARN)
        write_atomic(file, json.dumps(found))
    return record | {key: found[key] for key in (*sorted(wanted), "settings")}


def finished(plan: ClassifierPlan, cut: Parts, folder: str) -> nn.Module:
    """The network that a run left in its folder."""
    return restore(network(cut.dataset, training(plan.data.dataset), plan.job.train_seed), Path(folder))
