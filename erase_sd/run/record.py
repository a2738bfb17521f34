"""The record of a run: what was done to which weights, by which versions, in what time, and how it ended."""

import json
import math
import platform
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erase_sd.common.files import write_atomic

try:
    import resource
except ImportError:  # on Windows
    import psutil

    resource = None

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def environment() -> dict:
    """Return versions, platform, thread count and, in a git checkout, the commit ("+changes" if files differ from it).

    A library that is not installed has the version None: classifiers need no diffusers.
    """
    libraries = dict(zip(LIBRARIES, map(_version, LIBRARIES), strict=True))
    return {
        "python": platform.python_version(),
        **libraries,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": _commit(Path(__file__).parent),
    }


def run_record(
    config: dict,
    *,
    seed: int,
    base: str,
    base_hash: str,
    seconds: float,
    trace: list[dict] | None = None,
    **more: object,
) -> dict:
    """Return everything worth knowing about a run, as JSON holds it.

    `base` names the model that was edited and `base_hash` its weights; `seconds` is the wall time; `trace` has the
    rows of the repair loop, of which a summary is kept. `more` is added as it is.
    """
    return {
        "config": config,
        "seed": seed,
        "base": {"model": base, "hash": base_hash},
        "seconds": round(seconds, 2),
        "peak_memory_mib": peak_memory(),
        "trace": summary(trace or []),
        **more,
        "environment": environment(),
    }


def write_run(folder: str | Path, run: dict) -> None:
    """Write folder/run.json; a number that JSON cannot hold, NaN or infinity, becomes its name."""
    _write_json(Path(folder) / "run.json", run)


def write_status(folder: str | Path, state: str, code: int, message: str = "") -> None:
    """Write folder/status.json: `state` is running, complete, stopped or failed, `code` the process's exit code.

    The accelerate launcher turns every failure into exit code 1; this file keeps the true one.
    """
    _write_json(Path(folder) / "status.json", {"state": state, "code": code, "message": message})


def summary(trace: list[dict]) -> dict:
    """Return the number of steps; of each number its first, last, lowest and highest value; of each flag the share.

    `trace` has one row per step; None stands for a quantity without a value in that step.
    """
    result: dict[str, object] = {"steps": len(trace)}
    for key in trace[0] if trace else ():
        values = [row[key] for row in trace if row.get(key) is not None]
        if values and key != "step":
            result[key] = _spread(values)
    return result


def _spread(values: list[float]) -> float | dict[str, float]:
    if isinstance(values[0], bool):
        return sum(values) / len(values)
    return {"first": values[0], "last": values[-1], "min": min(values), "max": max(values)}


def finite(value: Any) -> Any:
    """Return a copy of nested dicts and lists in which NaN and infinity are text: a finished run keeps its record."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: names, types, shapes and bytes, whatever their file or device."""
    total = sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def peak_memory() -> dict[str, float]:
    """Return the highest memory of this process so far in MiB: of the host and, with CUDA, of the device."""
    if resource is None:
        size, unit = psutil.Process().memory_info().peak_wset, 2**20
    else:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS and in KiB elsewhere
    peak = {"host": round(size / unit, 1)}
    if torch.cuda.is_available():
        peak["device"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else: installed inside somebody else's checkout
        commit = git("rev-parse", "HEAD")
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return commit + "+changes" if changed else commit
    except (OSError, subprocess.CalledProcessError):  # no git, no commit yet, or an installed copy
        return None


def _write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
