"""Work shared among processes: two ranks (torchrun, gloo) do half of it each, have all of it, and stop together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from erase_sd.common.processes import sample_shared, shared

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, signal, sys
from torch import distributed
from erase_sd.common.processes import sample_shared
from erase_sd.common.signals import StopFlag

distributed.init_process_group("gloo")
rank, done, told = distributed.get_rank(), [], int(sys.argv[2])

def work(texts, seeds):
    done.append(texts)
    if rank == 1 and len(done) == told:
        os.kill(os.getpid(), signal.SIGTERM)  # this rank alone
    return [f"{text} {seed}" for text, seed in zip(texts, seeds)]

code = 0
with StopFlag():
    try:
        images = sample_shared(list("abcdefg"), list(range(7)), 2, work, "")
    except SystemExit as stopped:
        images, code = None, stopped.code
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump([done, images, code], file)
distributed.destroy_process_group()
"""
WHOLE = [["a 0", "b 1"], ["c 2", "d 3"], ["e 4", "f 5"], ["g 6"]]


def ranks(folder: Path, told: int) -> list:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, folder / "script.py", folder, str(told)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_do_half_each_and_have_all(tmp_path: Path) -> None:
    zero, one = ranks(tmp_path, told=0)
    assert zero == [[["a", "b"], ["e", "f"]], WHOLE, 0]
    assert one == [[["c", "d"], ["g"]], WHOLE, 0]


def test_a_rank_that_is_told_to_stop_takes_the_other_along(tmp_path: Path) -> None:
    zero, one = ranks(tmp_path, told=1)
    assert zero == [[["a", "b"]], None, 143]
    assert one == [[["c", "d"]], None, 143]


def test_alone_it_does_everything_in_order() -> None:
    def work(texts: list[str], seeds: list[int]) -> list[str]:
        return [f"{text} {seed}" for text, seed in zip(texts, seeds, strict=True)]

    assert sample_shared(list("abcdefg"), list(range(7)), 2, work, "") == WHOLE
    assert list(shared([], lambda item: pytest.fail("there is nothing to do"))) == []


def test_a_signal_stops_after_the_item_at_hand() -> None:
    seen = []

    def work(item: int) -> None:
        seen.append(item)
        if item == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as exit:
        list(shared(range(5), work))
    assert exit.value.code == 130
    assert seen == [0, 1, 2]
