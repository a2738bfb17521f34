"""What every part may use: keyed randomness, digests, atomic writes, checkpoints, and all of `erase_sd.process`.

Standard library at import; torch and safetensors load in the functions that need them, so that --help is instant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_sd.process import RunLock as RunLock
from erase_sd.process import StopFlag as StopFlag
from erase_sd.process import UserError as UserError
from erase_sd.process import run_main as run_main

if TYPE_CHECKING:
    from torch import Generator, Tensor

log = logging.getLogger(__name__)


def generator(seed: int, *key: int | str) -> Generator:
    """A CPU generator that depends on (seed, key) alone: ("noise", step, sample), ("trim", parameter name), ...

    torch keeps 32 bits of a CPU seed, so that two of 65 000 keys can be expected to share their stream.
    """
    import torch

    return torch.Generator().manual_seed(int(digest([seed, *key])[:15], 16))


def digest(obj: Any) -> str:
    """SHA-256, in hex, of bytes or of anything JSON can write (order of keys ignored)."""
    data = obj if isinstance(obj, bytes) else json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write a file so that a killed process leaves either the old one or the new one; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block succeeds and is removed when it fails.

    A folder already at `path` is moved aside first and removed last: a process killed between these two renames leaves
    it beside `path` as .<name>.*.old. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as root:
        temporary = Path(root, "new")
        temporary.mkdir()  # not the outer one, which is private to this user
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        aside = Path(f"{root}.old")
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's entries before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(root: Path | str, step: int, tensors: dict[str, Tensor], meta: dict, limit: int | None) -> Path:
    """Write root/checkpoint-<step> with state.safetensors and state.json; returns the folder.

    `meta` is anything JSON can write. Once the checkpoint is complete, all but the newest `limit` up to this step go.
    """
    from safetensors.torch import save_file

    root = Path(root)
    with new_folder(root / f"checkpoint-{step:06d}") as folder:
        file = folder / "state.safetensors"
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, file)
        manifest = {file.name: {"size": file.stat().st_size, "sha256": file_digest(file)}}
        (folder / "state.json").write_text(json.dumps({"step": step, "meta": meta, "files": manifest}, indent=2))
    for leftover in root.glob(".checkpoint-*"):  # of a process killed while it wrote
        shutil.rmtree(leftover)
    if limit is not None:
        done = [folder for n, folder in _checkpoints(root) if n <= step]
        for old in done[: max(0, len(done) - max(1, limit))]:
            shutil.rmtree(old)
    return root / f"checkpoint-{step:06d}"


class Stored(Mapping):
    """The tensors of a safetensors file whose names begin with a prefix, under the rest of their names, on the CPU.

    Each is read when it is asked for, and again when it is asked for again: a resumed run holds no second copy.
    """

    def __init__(self, path: Path | str, prefix: str = "") -> None:
        from safetensors import safe_open

        self._path, self._prefix = path, prefix
        self._file = safe_open(path, framework="pt", backend="pread")  # pages of a mapped file would stay in memory
        names = (name for name in self._file.keys() if name.startswith(prefix))  # noqa: SIM118
        self._names = dict.fromkeys(name.removeprefix(prefix) for name in names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def below(self, prefix: str) -> Stored:
        """Those of the tensors whose names begin with the prefix."""
        return Stored(self._path, self._prefix + prefix)


def load_checkpoint(path: Path | str) -> tuple[Stored, dict]:
    """(tensors, meta) of a checkpoint folder; UserError if it is missing or damaged."""
    path = Path(path)
    if (reason := _damage(path)) is not None:
        others = ", ".join(str(folder) for _, folder in _checkpoints(path.parent) if folder != path) or "none"
        raise UserError(f"cannot continue from {path}: {reason} (other checkpoints there: {others})")
    return Stored(path / "state.safetensors"), json.loads((path / "state.json").read_text())["meta"]


def latest_checkpoint(root: Path | str) -> Path | None:
    """The newest checkpoint folder whose files are whole; warns about damaged ones it passes over."""
    for _, folder in reversed(_checkpoints(Path(root))):
        if (reason := _damage(folder)) is None:
            return folder
        log.warning("skipping %s: %s", folder, reason)
    return None


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in root.glob("checkpoint-*")]
    return sorted((int(match[1]), folder) for match, folder in found if match)


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None; every byte is compared with the manifest."""
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
