"""Keyed randomness, digests, atomic writes, names of folders, and what importing the package costs."""

import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import erase_sd
from erase_sd import api
from erase_sd.common import files
from erase_sd.common.files import digest, file_digest, new_folder, slug, write_atomic
from erase_sd.common.rng import generator

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_an_error_of_the_disk_names_the_place(tmp_path: Path):
    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ):
        with pytest.raises(OSError, match="unet") as raised, new_folder(tmp_path / "unet"):
            raise error
        assert raised.value.errno == 28
        assert raised.value.filename == str(tmp_path / "unet")
    with pytest.raises(SafetensorError, match="header"), new_folder(tmp_path / "unet"):
        raise SafetensorError("header too large")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def group_readable() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("group_readable")
def test_what_safetensors_writes_follows_the_umask(tmp_path: Path):
    with new_folder(tmp_path / "unet") as folder:
        save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
    write_atomic(tmp_path / "run.json", "{}")
    for file in (tmp_path / "unet/x.safetensors", tmp_path / "run.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


def test_generators_depend_on_seed_and_key_alone():
    def draw(*key):
        torch.rand(1)  # moves the global generator, which must not matter
        return torch.randn(4, generator=generator(*key)).tolist()

    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    keys = [
        (0, "noise", 3),
        (1, "noise", 3),
        (0, "noise", 4),
        (0, "batch", 3),
        (0, "noise", "3"),
        (0, "noise", 3, 0),
        (0,),
    ]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_generators_leave_the_global_state_alone():
    before = torch.get_rng_state()
    torch.randn(4, generator=generator(0, "noise"))
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_streams_are_frozen():
    """Changing them would change every result ever published with a seed."""
    drawn = torch.randint(10**6, (3,), generator=generator(0, "frozen", 1))
    assert drawn.tolist() == [263393, 519695, 284898]


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert digest("a") != digest(b"a")
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(TypeError):
        digest({"a": object()})


def test_file_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert file_digest(tmp_path / "f") == digest(b"abc" * 1000)


def test_write_atomic_writes_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", "é")
    write_atomic(str(tmp_path / "b"), b"\0")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()
    assert (tmp_path / "b").read_bytes() == b"\0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "new"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_no_leftovers(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "unet"
    with new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "w").write_text("1")
        assert not path.exists()
        assert temporary.is_dir()
    assert (path / "sub" / "w").read_text() == "1"
    with pytest.raises(RuntimeError), new_folder(path) as temporary:
        (temporary / "w").write_text("half")
        raise RuntimeError
    assert (path / "sub" / "w").exists()
    assert not (path / "w").exists()
    with new_folder(path) as temporary:
        (temporary / "w").write_text("2")
    assert [p.name for p in path.iterdir()] == ["w"]
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def printed(code):
    """What a fresh Python process prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("cat", "cat"),
        ("neon style", "neon-style"),
        ("neon-style", "neon-style-"),
        ("Cat", "cat-"),
        ("café", "cafe-"),
        ("con", "con-"),
        ("../etc", "etc-"),
        ("猫", ""),
        ("x" * 200, "x" * 60 + "-"),
    ],
)
def test_folder_names_are_plain_and_distinct(text: str, folder: str):
    name = slug(text)
    assert re.fullmatch(r"[a-z0-9-]{1,69}", name)
    assert name.startswith(folder)
    assert (len(name) - len(folder)) in (0, 8)


def test_texts_that_look_alike_get_different_folders():
    texts = ["van gogh", "Van Gogh", "van-gogh", "van  gogh", "van gogh!", "ván gogh", "猫", "犬"]
    assert len({slug(text) for text in texts}) == len(texts)


def test_importing_the_package_loads_no_torch():
    code = "import sys, erase_sd; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert printed(code) == "[]\n"


def test_the_package_offers_erase_and_nothing_else():
    assert erase_sd.erase is api.erase
    with pytest.raises(AttributeError, match="has no attribute 'eraze'"):
        erase_sd.eraze  # noqa: B018


@pytest.mark.parametrize("module", ["erase_sd.train", "eval.generate", "classification.unlearn"])
def test_without_what_windows_lacks_everything_imports_and_writes(tmp_path, module):
    code = f"""
        import sys
        from types import SimpleNamespace as Stub
        sys.modules |= dict.fromkeys(("fcntl", "resource"))  # to import one of them is an ImportError now
        memory = Stub(memory_info=lambda: Stub(peak_wset=3 * 2**20))
        sys.modules["psutil"] = Stub(Process=lambda: memory)  # as it is there
        import {module}
        from erase_sd.common.files import new_folder, write_atomic
        from erase_sd.run.record import peak_memory
        assert peak_memory()["host"] == 3
        write_atomic({str(tmp_path / "a" / "file")!r}, "text")
        with new_folder({str(tmp_path / "b")!r}) as folder:
            (folder / "file").write_text("text")
        print("written")
        """
    assert printed(code) == "written\n"
    assert (tmp_path / "a" / "file").read_text() == (tmp_path / "b" / "file").read_text() == "text"


def test_on_windows_no_folder_is_flushed_and_files_are_opened_for_writing(tmp_path, monkeypatch):
    opened = []

    def opener(path, flags):
        opened.append((Path(path).is_dir(), flags))
        return os.open(os.devnull, os.O_RDONLY)

    (tmp_path / "file").write_text("text")
    windows = SimpleNamespace(name="nt", open=opener, O_RDWR=os.O_RDWR, fsync=id, close=os.close)
    monkeypatch.setattr(files, "os", windows)
    for path in (tmp_path, tmp_path / "file"):
        files._flush(path)
    assert opened == [(False, os.O_RDWR)]
