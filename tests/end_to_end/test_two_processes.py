"""Two processes (torchrun, gloo), the network copied to each (DDP) or divided among them (FSDP2), against one.

This file is also the script that torchrun starts: the folder of a model, and one for what is found.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.processes import accelerator
from erase_sd.common.rng import generator
from erase_sd.core.sensitivity import entries, magnitude, threshold
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.sharded import wanted
from erase_sd.denoising.task import DenoisingTask
from erase_sd.methods.scissorhands import Scissorhands
from erase_sd.models.pipeline import load
from erase_sd.run import loop
from erase_sd.run.folder import RunFolder
from erase_sd.settings import TaskSettings

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
QUICK = (
    "--steps 3 --lr 1e-4 --batch_size 4 --sensitivity_batches 1 --forget_images 4 --retain_images 4 --sample_steps 2"
)
LOSSES = TaskSettings(
    batch_size=5, trim_scope="full", gradient_accumulation_steps=2
)  # slices of 3 and 2, parts of 1 and 2
METHODS = {
    "paper": Scissorhands(steps=3, lr=0.05, fraction=0.01, saliency="signed", sensitivity_batches=2),
    "ours": Scissorhands(
        steps=3,
        lr=0.05,
        fraction=0.01,
        saliency="contrast",
        sensitivity_batches=2,
        objective="redirect",
        constraint="contrast",
        retain_loss="original",
        momentum=0.9,
        max_grad_norm=0.5,
    ),
    "ties": Scissorhands(steps=1, lr=0.05, fraction=0.1, saliency="magnitude"),
}


def made_up() -> Samples:
    rng, n = generator(0, "two processes"), 6
    return Samples(
        forget=torch.randn(n, 4, 8, 8, generator=rng),
        retain=torch.randn(n, 4, 8, 8, generator=rng),
        caption=torch.arange(n),
        anchor=torch.arange(n) + n,
        keep=torch.arange(n) + 2 * n,
        embeddings={"encoder_hidden_states": torch.randn(3 * n + 1, 77, 32, generator=rng)},
        empty=3 * n,
    )


def started(folder: str, name: str, fsdp: bool = False) -> tuple[DiffusionPipeline, DenoisingTask]:
    pipe = load(folder)
    for p in pipe.unet.parameters() if name == "ties" else ():
        p.data = (p.data * 50).round() / 50
    return pipe, DenoisingTask(pipe, made_up(), LOSSES, 0, accelerator(None), fsdp)


def found(folder: str, fsdp: bool = False) -> dict[str, Tensor]:
    """Per method the weights after the trim, all c and cos, the optimiser and the weights at the end; all whole."""
    results: dict[str, Tensor] = {}
    for name, method in METHODS.items():
        pipe, task = started(folder, name, fsdp)
        records = []
        for record, state in method(task):  # noqa: B007
            if record.get("phase") == "trim":
                trimmed = task.shards.gather(task.trimmable())
                results |= {f"{name}/trimmed/{n}": x.detach().clone() for n, x in trimmed.items()}
                for dtype in (torch.int16, torch.bool, torch.bfloat16):  # of a state: what kahan keeps, masks
                    other = {n: (100 * p.detach()).to(dtype) for n, p in task.trimmable().items()}
                    results |= {f"{name}/trimmed/{n} {dtype}": x for n, x in task.shards.gather(other).items()}
                results[f"{name}/changed"] = torch.tensor(list(record["changed"].values()))
            if "c" in record:
                records.append([record["c"], record["cos"]])
        results |= {f"{name}/optimizer/{n}": x.clone() for n, x in task.shards.gather(state["optimizer"]).items()}
        task.assemble()
        task.release()
        results[f"{name}/c"] = torch.tensor(records, dtype=torch.float64)
        results |= {f"{name}/weights/{n}": p.detach().clone() for n, p in pipe.unet.named_parameters()}
    return results


def interrupted(folder: str, where: str) -> dict[str, Tensor]:
    """The weights of the first method, sharded, when one process alone is told to stop in the second of its steps."""
    rank = int(os.environ["RANK"])
    for attempt in ("stopped", "resumed"):
        pipe, task = started(folder, "ours", fsdp=True)

        def check(step: int) -> None:
            if (attempt, step, rank) == ("stopped", 1, 1):  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)

        with RunFolder(where, {}, writes=rank == 0) as place:
            task.accelerator.wait_for_everyone()
            weights = task.trimmable() | task.trainable()
            try:
                progress = loop.run(METHODS["ours"], task, weights, place, every=1, check=check, description="")
                assert attempt == "resumed"
                assert len(progress.trace) == 3
            except SystemExit as stop:
                assert attempt == "stopped"
                assert stop.code == 128 + signal.SIGTERM
            task.accelerator.wait_for_everyone()
        task.assemble()
        task.release()
    return {f"weights/{n}": p.detach().clone() for n, p in pipe.unet.named_parameters()}


@pytest.fixture(scope="module")
def together(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process finds, and two with DDP and with FSDP2."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, *TORCHRUN, __file__, str(tiny_sd), str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    AcceleratorState._reset_state(reset_partial_state=True)
    one = found(str(tiny_sd))
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"one": one, **{file.stem: load_file(file) for file in folder.glob("*.safetensors")}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_select_the_same_entries_and_give_them_the_same_values(together: dict, kind: str, method: str):
    one, two = together["one"], together[kind]
    assert one.keys() == two.keys()
    assert one[f"{method}/changed"].sum() > 100
    assert torch.equal(one[f"{method}/changed"], two[f"{method}/changed"])
    for name in (name for name in one if name.startswith(f"{method}/trimmed/")):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_same_c_and_weights(together: dict, kind: str, method: str):
    one, two = together["one"], together[kind]
    torch.testing.assert_close(two[f"{method}/c"], one[f"{method}/c"], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (one[f"{method}/c"][:, 0] > 0).any() or method == "ties"
    for name in (name for name in one if name.startswith((f"{method}/weights/", f"{method}/optimizer/"))):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)


def test_ties_were_at_the_threshold(tiny_sd: Path):
    """Or the comparison above says nothing of them."""
    _, task = started(str(tiny_sd), "ties")
    scores = magnitude(task.trimmable())
    tau, wanted = threshold(scores, round(0.1 * entries(scores)))
    tied = {name: int((s == tau).sum()) for name, s in scores.items()}
    assert 1 < wanted < sum(tied.values())
    assert sum(n > 0 for n in tied.values()) > 10


@pytest.mark.slow
def test_shards_resume_bit_for_bit_after_one_process_was_told_to_stop(together: dict):
    for name, x in together["resumed"].items():
        assert torch.equal(x, together["fsdp"][f"ours/{name}"]), name


def test_sharding_is_asked_for_here_or_in_accelerates_configuration():
    def processes(n: int, version: int | None = None) -> SimpleNamespace:
        kind = DistributedType.FSDP if version else DistributedType.MULTI_CPU
        plugin = SimpleNamespace(fsdp_version=version)
        return SimpleNamespace(num_processes=n, distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin))

    assert wanted(processes(2), True)
    assert wanted(processes(2, version=2), False)
    assert not wanted(processes(2), False)
    assert not wanted(processes(1), True)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        wanted(processes(2, version=1), False)


def main_job(tiny_sd: Path, folder: Path, *more: str, launcher: tuple[str, ...] = TORCHRUN) -> dict[str, Tensor]:
    command = [sys.executable, *launcher, str(ROOT / "erase_sd" / "train.py"), "--concept", "nudity"]
    command += ["--model", str(tiny_sd), "--output_dir", str(folder), *QUICK.split(), *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("To use it") == 1  # said once, by the first process
    return UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_the_main_job_on_two_processes_finds_what_one_finds(tiny_sd: Path, tmp_path: Path, more: tuple[str, ...]):
    one = main_job(tiny_sd, tmp_path / "one", launcher=())
    before = UNet2DConditionModel.from_pretrained(str(tiny_sd), subfolder="unet").state_dict()
    moved = max(float((one[name] - x).abs().max()) for name, x in before.items())
    two = main_job(tiny_sd, tmp_path / "two", *more)
    apart = max(float((two[name] - x).abs().max()) for name, x in one.items())
    # AdamW's first steps have the gradient's sign, and some are nearly zero
    assert moved > 1e-4
    assert apart < 0.1 * moved
    close = torch.cat([((two[name] - x).abs() < 1e-6).flatten() for name, x in one.items()])
    assert close.float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_when_torchrun_goes_both_ranks_go_and_the_same_command_goes_on(
    tiny_sd: Path, tmp_path: Path, signum: int
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, *TORCHRUN, str(ROOT / "erase_sd" / "train.py"), "--concept", "nudity"]
    command += ["--model", str(tiny_sd), "--output_dir", str(folder), *QUICK.split(), "--steps", "40"]
    command += ["--checkpointing_steps", "2", "--picture_steps", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    wait_until(lambda: list((folder / "checkpoints").glob("checkpoint-*[1-9]*")), 200)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) >= 2
    launcher.send_signal(signum)
    launcher.wait(60)
    _, left = psutil.wait_procs(ranks, 60)
    assert not left, (tmp_path / "log").read_text()[-3000:]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 143), (tmp_path / "log").read_text()[-3000:]
    assert not (folder / "unet").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert " 1/40 [" not in again.stderr, again.stderr[-3000:]


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


if __name__ == "__main__":
    model, out = sys.argv[1:]
    results = {"ddp": found(model), "fsdp": found(model, fsdp=True)}
    results["resumed"] = interrupted(model, f"{out}/run")
    if os.environ["RANK"] == "0":
        for stem, tensors in results.items():
            save_file(tensors, f"{out}/{stem}.safetensors")
