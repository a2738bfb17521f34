"""Keyed randomness, digests, atomic writes, and what importing the package costs."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from erase_sd.common import files
from erase_sd.common.files import digest, file_digest, new_folder, write_atomic
from erase_sd.common.rng import generator

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


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
    assert digest([1, 2]) != digest([2, 1]) and digest("a") != digest(b"a")
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(TypeError):
        digest({"a": object()})


def test_file_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert file_digest(tmp_path / "f") == digest(b"abc" * 1000)


def test_write_atomic_writes_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", "é")
    write_atomic(str(tmp_path / "b"), b"\0")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode() and (tmp_path / "b").read_bytes() == b"\0"
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
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "unet"
    with new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "w").write_text("1")
        assert not path.exists() and temporary.is_dir()
    assert (path / "sub" / "w").read_text() == "1"
    with pytest.raises(RuntimeError), new_folder(path) as temporary:
        (temporary / "w").write_text("half")
        raise RuntimeError
    assert (path / "sub" / "w").exists() and not (path / "w").exists()
    with new_folder(path) as temporary:
        (temporary / "w").write_text("2")
    assert [p.name for p in path.iterdir()] == ["w"] and list(tmp_path.iterdir()) == [path]


def test_new_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def printed(code):
    """What a fresh Python process prints, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def test_importing_the_package_and_the_runtime_loads_no_torch():
    code = "import sys, erase_sd.runtime; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert printed(code) == "[]\n"


@pytest.mark.parametrize("first", ["from erase_sd.api import erase", "import erase_sd.api", "pass"])
def test_the_verb_is_not_hidden_by_its_module(first):
    """A stand-in for erase_sd/erase.py, since the real one loads diffusers."""
    code = f"""
        import sys, importlib.machinery as m, importlib.abc
        class Fake(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path, target=None):
                return m.ModuleSpec(name, self) if name == "erase_sd.api" else None
            def exec_module(self, module):
                module.erase = lambda: "erased"
        sys.meta_path.insert(0, Fake())
        {first}
        from erase_sd import erase
        import erase_sd
        print(erase(), erase_sd.erase())
        """
    assert printed(code) == "erased erased\n"
