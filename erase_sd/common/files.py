"""Files and folders: digests, atomic writes, one run per folder, names of folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from erase_sd.common.errors import UserError

WINDOWS_DEVICE = r"con|prn|aux|nul|(com|lpt)[0-9]"  # no file or folder can have these names there


def digest(obj: Any) -> str:
    """Return the SHA-256, in hex, of bytes or of anything JSON can write (order of keys ignored)."""
    data = obj if isinstance(obj, bytes) else json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write a file so that a killed process leaves either the old one or the new one; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with naming(path):
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have what a full disk and the like raise name the path: OSError, as which safetensors' own errors come too."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
        with naming(path):
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                follow_umask(file)
            _flush(file)
        aside = Path(f"{root}.old")
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def follow_umask(file: Path) -> None:
    """Give a file the mode of any new one: safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes killed inside `write_atomic` and `new_folder` left here; nobody else may be writing."""
    for path in folder.glob(".*"):
        if path.is_dir() and re.fullmatch(r"\..+\.[a-z0-9_]{8}(\.old)?", path.name):
            shutil.rmtree(path)
        elif path.is_file() and re.fullmatch(r"\..+\.\d+\.\d{6,}", path.name):
            path.unlink()


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's entries before anything relies on it."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # and flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunLock:
    """Hold `folder` for one process; UserError when another one holds it. A killed process lets go of it."""

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder, ".lock")
        self._lock = FileLock(self.path)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another run is writing to {self.path.parent}: wait for it or choose another folder"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def claim(folder: Path, file: str, config: dict[str, Any], free: frozenset[str] = frozenset()) -> None:
    """Refuse an --output_dir that holds anything but a run of this very configuration, before anything is written.

    `file` is where runs of this kind keep their configuration, as JSON; `free` options may differ.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    if not (folder / file).is_file():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"--output_dir {folder} holds other files: name an empty or a new folder")
        return
    try:
        there = dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"--output_dir {folder} holds a {file} of something else: name another") from error
    for option in sorted((there.keys() | config.keys()) - free):
        if there.get(option) != config.get(option):
            raise UserError(
                f"--output_dir {folder} belongs to a run with {option} {there.get(option)}, not "
                f"{config.get(option)}: name another folder or remove that one"
            )


def slug(text: str) -> str:
    """Return a folder name for `text`: "cat" is cat, "neon style" is neon-style.

    Lower-case ASCII on every file system; a hash keeps texts apart that would otherwise share a folder.
    """
    text = unicodedata.normalize("NFC", text)
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    folder = "-".join(re.findall(r"[a-z0-9]+", ascii_text))[:60].strip("-")
    if folder.replace("-", " ") == text and not re.fullmatch(WINDOWS_DEVICE, folder):
        return folder
    suffix = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{folder}-{suffix}" if folder else suffix


def text_around(page: Path, name: str) -> tuple[str, str]:
    """Return a page up to its first mark of this name, and from its last. Raises UserError without the marks."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, _, rest = text.partition(start)
    _, last, tail = rest.partition(end)
    if not last:
        raise UserError(f"--readme {page} has no line {start} followed by {end}")
    return head + start, last + tail


def replace_between(page: Path, name: str, text: str) -> None:
    """Put the text between a page's marks of this name. Raises UserError as `text_around` does."""
    head, tail = text_around(page, name)
    write_atomic(page, f"{head}\n{text}{tail}")
