"""What every part may use: keyed randomness, digests, atomic writes, and all of `erase_sd.process`.

Standard library at import; torch loads in the function that needs it, so that --help is instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_sd.process import RunLock as RunLock
from erase_sd.process import StopFlag as StopFlag
from erase_sd.process import UserError as UserError
from erase_sd.process import run_main as run_main

if TYPE_CHECKING:
    from torch import Generator


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


def around(readme: Path, name: str) -> tuple[str, str]:
    """What a page has up to its first mark of this name, and from its last; UserError if they are not there."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    page = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    head, _, rest = page.partition(start)
    _, last, tail = rest.partition(end)
    if not last:
        raise UserError(f"--readme {readme} has no line {start} followed by {end}")
    return head + start, last + tail


def replace_between(readme: Path, name: str, text: str) -> None:
    """Put the text between a page's marks of this name. Raises UserError as `around` does."""
    head, tail = around(readme, name)
    write_atomic(readme, f"{head}\n{text}{tail}")


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


def remove_leftovers(folder: Path) -> None:
    """Remove what processes killed inside `write_atomic` and `new_folder` left here; nobody else may be writing."""
    for path in folder.glob(".*"):
        if path.is_dir() and re.fullmatch(r"\..+\.[a-z0-9_]{8}(\.old)?", path.name):
            shutil.rmtree(path)
        elif path.is_file() and re.fullmatch(r"\..+\.\d+\.\d{6,}", path.name):
            path.unlink()


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's entries before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
