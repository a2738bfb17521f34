"""Signals, launchers, kills, locks and exit codes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from erase_sd.common.cli import run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock
from erase_sd.common.signals import StopFlag
from erase_sd.run.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def python(code, **environment):
    """Start a Python process on this repository; `code` may print to be waited for."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {
        "PYTHONPATH": ROOT,
        **environment,
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_the_handlers_come_back(signum):
    before = signal.getsignal(signum)
    with StopFlag() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signum)
        wait_until(stop.is_set)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_signal_interrupts_unless_it_is_the_launchers_copy(monkeypatch):
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        assert stop.signum == signal.SIGTERM
        monkeypatch.setattr(StopFlag, "GRACE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_the_flag_installs_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopFlag() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


CHILD = """
import os, sys, time
from erase_sd.common.signals import StopFlag
StopFlag.POLL = 0.05
with StopFlag() as stop:
    open(sys.argv[1], "w").write("up")
    end = time.monotonic() + float(sys.argv[2])
    while not stop.is_set() and time.monotonic() < end:
        time.sleep(0.02)
    open(sys.argv[1], "w").write(f"stopped {int(stop.signum)}" if stop.is_set() else "finished")
"""


@pytest.mark.parametrize(
    ("environment", "seconds", "outcome"),
    [({"ACCELERATE_MIXED_PRECISION": "no"}, 20, "stopped 15"), ({}, 1, "finished")],
    ids=["accelerate", "shell"],
)
def test_the_death_of_the_launcher_stops_the_run_but_that_of_a_shell_does_not(tmp_path, environment, seconds, outcome):
    report = tmp_path / "report"
    launcher = python(
        f"""
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", {CHILD!r}, {str(report)!r}, "{seconds}"]).wait()
        """,
        **environment,
    )
    wait_until(lambda: report.exists() and report.read_text() == "up")
    launcher.kill()
    launcher.wait()
    wait_until(lambda: report.read_text() == outcome)
    launcher.communicate()


def test_kill_minus_nine_inside_a_checkpoint_leaves_the_previous_one(tmp_path):
    good = save_checkpoint(tmp_path, 1, {"w": torch.ones(3)}, {"step": 1}, 1)
    child = python(
        f"""
        import time, torch
        from erase_sd.run import checkpoints
        save = checkpoints.save_file
        def slow(tensors, file):
            save(tensors, file)
            print("half", flush=True)
            time.sleep(60)
        checkpoints.save_file = slow
        checkpoints.save_checkpoint({str(tmp_path)!r}, 2, {{"w": torch.ones(1000)}}, {{}}, 1)
        """
    )
    assert child.stdout.readline() == "half\n"
    child.kill()
    child.communicate()
    assert len(os.listdir(tmp_path)) == 2  # the good one and a hidden half
    assert latest_checkpoint(tmp_path) == good
    assert load_checkpoint(good)[1] == {"step": 1}
    save_checkpoint(tmp_path, 2, {"w": torch.ones(3)}, {}, 1)
    assert os.listdir(tmp_path) == ["checkpoint-000002"]


def test_one_folder_has_one_run(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(UserError, match="another run is writing to"), RunLock(tmp_path / "run"):
            pass
        with RunLock(tmp_path / "other"):
            pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_killed_run_lets_go_of_its_folder(tmp_path):
    child = python(
        f"""
        import time
        from erase_sd.common.files import RunLock
        with RunLock({str(tmp_path)!r}):
            print("locked", flush=True)
            time.sleep(60)
        """
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(UserError), RunLock(tmp_path):
        pass
    child.kill()
    child.communicate()
    with RunLock(tmp_path):
        pass


def test_a_users_mistake_is_one_sentence_and_code_2(capsys):
    def main():
        raise UserError("there is no model at x:\n  check the path")

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: there is no model at x: check the path\n"


@pytest.mark.parametrize("code", [None, 0, 3])
def test_run_main_passes_the_exit_code_on(code):
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: code)
    assert exit.value.code == code


def test_our_own_mistakes_keep_their_traceback():
    def main():
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        run_main(main)
