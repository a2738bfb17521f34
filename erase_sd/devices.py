"""The accelerator of this process, its trackers; several CPU processes have to be told that they belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from erase_sd.process import UserError

PATIENCE = timedelta(days=1)  # one process may draw the last pictures while the others wait; a launcher sees the dead


def accelerator(
    mixed_precision: str | None, report_to: str | None = None, folder: str | Path | None = None
) -> Accelerator:
    """Device, precision and process group as `accelerate launch` or torchrun set them up.

    `report_to` names a tracker of accelerate, which writes its files below `folder`. Raises UserError for one that is
    not installed, which accelerate would leave out without a word, and for one that needs a folder and has none.
    """
    if report_to and report_to not in [str(kind) for kind in get_available_trackers()]:
        how = "install the trackers extra" if report_to == "tensorboard" else f"pip install {report_to}"
        raise UserError(f"--report_to {report_to} is not installed: {how}, or give --report_to none")
    if report_to and LOGGER_TYPE_TO_CLASS[report_to].requires_logging_directory and not folder:
        raise UserError(f"--report_to {report_to} writes files: give an output_dir")
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.accelerator.is_available(),
        log_with=report_to,
        project_dir=str(Path(folder) / "logs") if folder else None,
        # micro-batches carry their share of the loss already: the launcher's number would divide it once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


@contextmanager
def tracked(accelerator: Accelerator, config: dict[str, Any]) -> Iterator[None]:
    """Give the accelerator's trackers the configuration, and close them however the block ends.

    Without trackers, or with those that a caller has started already, it does nothing.
    """
    if accelerator.trackers:
        yield
        return
    accelerator.init_trackers("erase-sd", config={name: _flat(value) for name, value in config.items()})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def _flat(value: Any) -> bool | int | float | str:
    """A value as every tracker takes it: numbers as they are, anything else as text."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, bool | int | float) else str(value)
