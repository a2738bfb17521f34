"""Checkpoints of anything that takes steps: whole or passed over, whatever happens to the process or the files."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest, new_folder, remove_leftovers

log = logging.getLogger(__name__)

KINDS = ("sensitivity", "checkpoint")  # checkpoints by what their number counts, in the order in which runs write them


def save_checkpoint(
    root: Path | str, step: int, tensors: dict[str, Tensor], meta: dict, limit: int | None, kind: str = "checkpoint"
) -> Path:
    """Write root/<kind>-<step> with state.safetensors and state.json; returns the folder.

    `meta` is anything JSON can write, `kind` one of KINDS. Once the checkpoint is complete, all but the newest `limit`
    up to this one go, and those after it: damaged ones, or what a run that was sent back has left behind.
    """
    root = Path(root)
    path = root / f"{kind}-{step:06d}"
    with new_folder(path) as folder:
        file = folder / "state.safetensors"
        stored = {}
        for name, x in tensors.items():
            stored[name] = x.detach().contiguous()
        save_file(stored, file)
        manifest = {file.name: {"size": file.stat().st_size, "sha256": file_digest(file)}}
        (folder / "state.json").write_text(json.dumps({"step": step, "meta": meta, "files": manifest}, indent=2))
    remove_leftovers(root)
    there = checkpoints(root)
    now = there.index(path)
    for other in [*there[now + 1 :], *there[: max(0, now + 1 - (limit or len(there)))]]:
        shutil.rmtree(other)
    return path


class StoredTensors(Mapping):
    """The tensors of a safetensors file whose names begin with a prefix, under the rest of their names, on the CPU.

    Each is read when it is asked for, and again when it is asked for again: a resumed run holds no second copy.
    """

    def __init__(self, path: Path | str, prefix: str = "") -> None:
        self._path, self._prefix = path, prefix
        self._file = safe_open(path, framework="pt", backend="pread")  # pages of a mapped file would stay in memory
        self._names: dict[str, None] = {}
        for name in list(self._file.keys()):
            if name.startswith(prefix):
                self._names[name.removeprefix(prefix)] = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def below(self, prefix: str) -> StoredTensors:
        """Return those of the tensors whose names begin with the prefix."""
        return StoredTensors(self._path, self._prefix + prefix)


def load_checkpoint(path: Path | str) -> tuple[StoredTensors, dict]:
    """Return (tensors, meta) of a checkpoint folder; UserError if it is missing or damaged."""
    path = Path(path)
    if (reason := _damage(path)) is not None:
        others = ", ".join([str(folder) for folder in checkpoints(path.parent) if folder != path]) or "none"
        raise UserError(f"cannot continue from {path}: {reason} (other checkpoints there: {others})")
    return StoredTensors(path / "state.safetensors"), json.loads((path / "state.json").read_text())["meta"]


def latest_checkpoint(root: Path | str) -> Path | None:
    """Return the newest checkpoint folder whose files are whole; warns about damaged ones it passes over."""
    for folder in reversed(checkpoints(root)):
        if (reason := _damage(folder)) is None:
            return folder
        log.warning("skipping %s: %s", folder, reason)
    return None


def checkpoints(root: Path | str) -> list[Path]:
    """Return the folders of all checkpoints, whole or damaged, oldest first."""
    found: list[tuple[int, int, Path]] = []
    for folder in Path(root).glob("*-*"):
        match = re.fullmatch(rf"({'|'.join(KINDS)})-(\d+)", folder.name)
        if match:
            found.append((KINDS.index(match[1]), int(match[2]), folder))
    return [folder for *_, folder in sorted(found)]


def _damage(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None; every byte is compared with the manifest."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        for name, expected in files.items():
            if (folder / name).stat().st_size != expected["size"]:
                return f"{name} is not {expected['size']} bytes long"
            if file_digest(folder / name) != expected["sha256"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{error.filename} does not exist"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is not a checkpoint's manifest"
    return None
