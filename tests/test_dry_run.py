"""--dry_run: the sizes of SD v1.4 from its configuration alone, and nothing sampled, loaded or written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from erase_sd import dry_run, train
from erase_sd.common.errors import UserError
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.task import DenoisingTask
from erase_sd.dry_run import cards, describe, memory, outline, sizes
from erase_sd.methods.base import Sizes
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
    assert text.count("<- peak") == 1
    assert "activations of 16" in text
    assert "GiB" in text
    assert not list(tmp_path.iterdir())


PEAKS: list[tuple[dict, float]] = [  # fp32 copies of the network that a step holds, counted by hand
    ({"method": "finetune", "optimizer": "sgd", "momentum": 0.0}, 2),
    ({"method": "ascent", "optimizer": "sgd", "momentum": 0.9}, 3),
    ({"objective": "ascent", "optimizer": "sgd"}, 3),
    ({"objective": "ascent", "optimizer": "adamw"}, 5),
    ({"objective": "redirect", "optimizer": "adamw"}, 6),
    ({"objective": "redirect", "optimizer": "sgd", "anchor_model": "current"}, 3),
    ({"objective": "ascent", "optimizer": "sgd", "weights_dtype": "bfloat16", "rounding": "kahan"}, 2.5),
    ({"projection": "off", "objective": "redirect", "optimizer": "sgd"}, 3),  # nothing waits for another gradient
    ({"preset": "sd", "low_memory": True}, 3),  # halves, bf16 g_f, 8 bits, no teacher
]


@pytest.mark.parametrize(("given", "copies"), PEAKS, ids=str)
def test_the_bytes_of_a_step(full_size: Path, given: dict, copies: float) -> None:
    plan = make(concept="cat", **{"preset": None if "method" in given else "paper", "train_scope": "full"} | given)
    pipe = outline(str(full_size), None)
    n = sizes(pipe.network, pipe.others, plan)
    assert n.network == SIZE
    assert n.trained == SIZE
    steps = memory(n, plan, accelerator=False)["steps"]
    assert sum(steps.values()) - steps["other parts"] == copies * 4 * SIZE


def test_its_sizes_are_those_of_the_task(tiny_sd: Path, tiny_pipe: StableDiffusionPipeline) -> None:
    plan = make(concept="cat", trim_scope="kv", rank_scope="xattn", train_scope="noxattn", fraction=0.1)
    pipe = outline(str(tiny_sd), None)
    n = sizes(pipe.network, pipe.others, plan)
    z = torch.zeros(1, 4, 8, 8)
    rows, words = torch.zeros(1, dtype=torch.long), {"encoder_hidden_states": torch.zeros(1, 77, 32)}
    samples = Samples(z, z, rows, rows, rows, words, 0)
    task = DenoisingTask(tiny_pipe, samples, plan.losses, 0, Accelerator(cpu=True))
    for found, group in ((n.trained, task.trainable), (n.trimmable, task.trimmable), (n.ranked, task.ranked)):
        assert found == sum(p.numel() for p in group().values())
    assert n.touched == sum(p.numel() for p in tiny_pipe.unet.parameters() if p.requires_grad)
    assert n.touched < n.network
    others = [*tiny_pipe.vae.parameters(), *tiny_pipe.text_encoder.parameters()]
    assert n.others == sum(p.numel() for p in others)
    task.release()


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--model", "./missing"], "does not exist"), (["--train_scope", "everything"], "unknown parameter group")],
)
def test_what_cannot_work_is_one_sentence(full_size: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(["--concept", "cat", "--model", str(full_size), "--dry_run", *more])


KEPT = [  # bytes per trained entry beside weights, gradient and optimizer: what a method declares, by hand
    ({"method": "finetune"}, 0, 0),
    ({"method": "salun"}, 1 + 4, 0),  # mask, frozen value
    ({"method": "selective-amnesia"}, 4 + 4, 0),  # Fisher information, theta*
    ({"method": "erasediff"}, 0, 4),  # g_F
    ({"preset": "sd"}, 0, 4),  # g_f
    ({"preset": "pocket"}, 4, 4),  # the weight before the update
]


@pytest.mark.parametrize(("given", "kept", "stored"), KEPT, ids=str)
def test_the_bytes_that_a_method_declares(given: dict, kept: int, stored: int) -> None:
    n = Sizes(network=100, others=10, trained=7, trimmable=5, ranked=11, touched=13)
    steps = make(concept="cat", **given).method.memory(n, 4)["steps"]
    assert steps["gradient"] == 4 * 13
    assert steps["kept by the method"] == 7 * kept
    assert steps["stored gradient"] == 7 * stored


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"method": "salun"}, 7),  # of the trained entries, one pass
        ({"preset": "paper"}, 11),  # of the ranked entries, one pass
        ({"saliency": "contrast"}, 3 * 11),
        ({"saliency": "random"}, None),
        ({"fraction": 0.0}, None),
        ({"method": "uce"}, None),
    ],
    ids=str,
)
def test_the_running_means_before_the_first_step(given: dict, means: int | None) -> None:
    n = Sizes(network=100, others=10, trained=7, trimmable=5, ranked=11, touched=13)
    phases = make(concept="cat", **given).method.memory(n, 4)
    if means is None:
        assert "sensitivity" not in phases
    else:
        assert phases["sensitivity"]["running means"] == 4 * means


def test_the_plan_for_gpus_names_what_it_will_do(full_size: Path) -> None:
    plan = make(concept="cat", preset="sd")
    pipe = outline(str(full_size), None)
    n = sizes(pipe.network, pipe.others, plan)
    how = dict(cards(pipe, n, plan))
    assert set(how) == {12, 16, 24, 40, 80}
    for gigabytes, text in how.items():
        assert ("--low_memory" in text) == (gigabytes < 24), text
        assert "of 16 samples at a time" in text
        assert float(text.split()[-2]) < gigabytes
    assert how[80].startswith("16 of 16")


def test_a_plan_that_fits_nowhere_says_so(full_size: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "GPUS", (4,))
    pipe, plan = outline(str(full_size), None), make(concept="cat", preset="sd")
    n = sizes(pipe.network, pipe.others, plan)
    ((_, text),) = cards(pipe, n, plan)
    assert "too large, even by --low_memory" in text


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_every_family_is_described(request: pytest.FixtureRequest, model: str) -> None:
    plan = make(concept="cat", preset="sd", trim_scope="full", resolution=64)
    text = describe(plan, str(request.getfixturevalue(model)))
    assert "activations of 16" in text
    assert text.count(" GPU ") == 5
