"""--dry_run: the sizes of SD v1.4 from its configuration alone, and nothing drawn, loaded or written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from erase_sd import dry_run as dryrun
from erase_sd import train
from erase_sd.common.errors import UserError
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingTask
from erase_sd.plan import make
from tests.conftest import SD14_UNET

SIZE = 859_520_964


@pytest.fixture(scope="module")
def full_size(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with SD v1.4's UNet, of which only the configuration files exist."""
    folder = shutil.copytree(tiny_sd, tmp_path_factory.mktemp("models") / "sd14")
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        file.unlink()
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | SD14_UNET))
    return folder


def test_it_describes_the_job_and_leaves_nothing_behind(
    full_size: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--concept", "nudity", "--model", str(full_size), "--preset", "authors-nsfw", "--dry-run"]
    words += ["--steps", "60", "--optimizer", "adamw", "--fraction", "0.1", "--rank_scope", "none"]
    assert train.main(words) == 0
    text = capsys.readouterr().out
    for found in (
        "UNet2DConditionModel, 859,520,964 parameters",
        "top 819,392 of 8,193,920 ranked",
        "60 steps of",
    ):
        assert found in text, text
    assert text.count("<- peak") == 1 and "GiB" in text and not list(tmp_path.iterdir())


PEAKS = [  # fp32 copies of the network that a step holds, counted by hand
    ({"method": "finetune", "optimizer": "sgd", "momentum": 0.0}, 2),
    ({"method": "ascent", "optimizer": "sgd", "momentum": 0.9}, 3),
    ({"objective": "ascent", "optimizer": "sgd"}, 3),
    ({"objective": "ascent", "optimizer": "adamw"}, 5),
    ({"objective": "redirect", "optimizer": "adamw"}, 6),
    ({"objective": "redirect", "optimizer": "sgd", "anchor_model": "current"}, 3),
    ({"objective": "ascent", "optimizer": "sgd", "weights_dtype": "bfloat16", "rounding": "kahan"}, 3),
]


@pytest.mark.parametrize(("given", "copies"), PEAKS, ids=str)
def test_the_bytes_of_a_step(full_size: Path, given: dict, copies: int) -> None:
    plan = make(concept="cat", **{"preset": None if "method" in given else "paper", "train_scope": "full"} | given)
    skeleton = dryrun.outline(str(full_size), None)
    n = dryrun.sizes(skeleton.pop("network"), skeleton, plan)
    assert n.network == n.trained == SIZE
    steps = dryrun.memory(n, plan, accelerator=False)["steps"]
    assert sum(steps.values()) - steps["other parts"] == copies * 4 * SIZE


def test_its_sizes_are_those_of_the_task(tiny_sd: Path, tiny_pipe: StableDiffusionPipeline) -> None:
    plan = make(concept="cat", trim_scope="kv", rank_scope="xattn", train_scope="noxattn", fraction=0.1)
    skeleton = dryrun.outline(str(tiny_sd), None)
    n = dryrun.sizes(skeleton.pop("network"), skeleton, plan)
    z = torch.zeros(1, 4, 8, 8)
    rows, words = torch.zeros(1, dtype=torch.long), {"encoder_hidden_states": torch.zeros(1, 77, 32)}
    samples = Samples(z, z, rows, rows, rows, words, 0)
    task = DenoisingTask(tiny_pipe, samples, plan.losses, 0, Accelerator(cpu=True))
    for found, group in ((n.trained, task.trainable), (n.trimmable, task.trimmable), (n.ranked, task.ranked)):
        assert found == sum(p.numel() for p in group().values())
    assert n.touched == sum(p.numel() for p in tiny_pipe.unet.parameters() if p.requires_grad) < n.network
    assert n.others == sum(p.numel() for part in (tiny_pipe.vae, tiny_pipe.text_encoder) for p in part.parameters())
    task.release()


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--model", "./missing"], "does not exist"), (["--train_scope", "everything"], "unknown parameter group")],
)
def test_what_cannot_work_is_one_sentence(full_size: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(["--concept", "cat", "--model", str(full_size), "--dry_run", *more])
