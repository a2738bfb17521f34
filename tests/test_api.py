"""erase() from Python on a tiny Stable Diffusion: what it changes, what it leaves behind, what it refuses."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoPipelineForText2Image,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image

from erase_sd import api, erase
from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest
from erase_sd.denoising import concept
from erase_sd.models.pipeline import load
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.run import loop
from erase_sd.run.record import weights_hash

QUICK = {
    "steps": 3,
    "lr": 1e-4,
    "batch_size": 2,
    "sensitivity_batches": 1,
    "checkpointing_steps": 1,
    "forget_images": 4,
    "retain_images": 4,
    "sample_steps": 2,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    *("job.json", "run.json", "status.json", "README.md", "before_after.png", ".lock"),
    *("trace.csv", "trace.png", "saliency.csv", "saliency.png", "unet/config.json", WEIGHTS),
}


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two steps per image instead of thirty; and accelerate forgets the precision of the test before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sample = concept.sample
    monkeypatch.setattr(concept, "sample", lambda *args, **options: sample(*args, **options | {"steps": 2}))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete run on nudity: read it, never write to it."""
    folder = tmp_path_factory.mktemp("runs") / "nudity"
    erase(load(str(tiny_sd)), "nudity", output_dir=folder, **QUICK)
    return folder


def parts(pipe: StableDiffusionPipeline) -> dict[str, str]:
    return {name: weights_hash(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_edits_the_unet_only_and_puts_everything_back(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipe.vae.requires_grad_(False)
    tiny_pipe.unet.conv_in.requires_grad_(False)
    before, flags = parts(tiny_pipe), [p.requires_grad for p in tiny_pipe.unet.parameters()]
    attributes, scheduler = set(tiny_pipe.unet.__dict__), tiny_pipe.scheduler
    random_state = torch.get_rng_state()
    record = erase(tiny_pipe, "cat", **QUICK)
    after = parts(tiny_pipe)
    assert {name for name in before if before[name] != after[name]} == {"unet"}
    assert [p.requires_grad for p in tiny_pipe.unet.parameters()] == flags
    assert not any(p.requires_grad for p in tiny_pipe.vae.parameters())
    for p in tiny_pipe.unet.parameters():
        assert p.grad is None
        assert p.device.type == "cpu"
    assert not tiny_pipe.unet.training
    assert set(tiny_pipe.unet.__dict__) == attributes
    assert tiny_pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not list(tmp_path.rglob("*"))
    assert record["config"]["concept"] == ["cat"]
    assert record["trace"]["steps"] == 3
    assert record["reinitialised"] > 100
    assert record["scores"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert 0 < record["method_seconds"] < record["seconds"]


def test_everything_is_in_the_folder(finished: Path) -> None:
    assert set(contents(finished)) == FILES
    assert json.loads((finished / "status.json").read_text()) == {"state": "complete", "code": 0, "message": ""}
    run = json.loads((finished / "run.json").read_text())
    assert run["config"] == json.loads((finished / "job.json").read_text())
    assert run["config"]["concept"] == ["nudity"]
    assert run["base"]["hash"] == run["config"]["base_hash"]
    rows = (finished / "trace.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss_r,loss_f,loss_o")
    assert len(rows) == 4
    with open(finished / "saliency.csv") as file:
        assert sum(int(row["changed"]) for row in csv.DictReader(file)) == run["reinitialised"] > 100
    card = (finished / "README.md").read_text()
    assert "## Limits" in card
    assert "Not validated on SD v1.4" in card
    assert "accelerate launch erase_sd/train.py --concept nudity" in card
    assert "--preset sd" in card
    assert "| forgotten | instead |" in card
    for name in ("trace.png", "saliency.png", "before_after.png"):
        Image.open(finished / name).verify()


def test_the_cards_code_loads_the_erased_model(
    finished: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (finished, tiny_sd):  # the card names no path of this machine, only the folders
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (finished / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert weights_hash(names["pipe"].unet) == weights_hash(load(str(tiny_sd), unet=str(finished)).unet)


def test_images_of_nudity_are_pixelated(finished: Path, tiny_sd: Path, tmp_path: Path) -> None:
    assert coarse(finished / "before_after.png")
    erase(load(str(tiny_sd)), " Nudity ", output_dir=tmp_path / "spelled", **QUICK | {"steps": 0})
    assert coarse(tmp_path / "spelled" / "before_after.png")
    erase(load(str(tiny_sd)), "cat", output_dir=tmp_path / "cat", **QUICK | {"steps": 0})
    assert not coarse(tmp_path / "cat" / "before_after.png")


def coarse(path: Path) -> bool:
    """Whether the left half, the concept, consists of 8 x 8 squares: then equal columns of pixels lie side by side."""
    x = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    x = x[:, : x.shape[1] // 2]
    inked = ((x.max(2) - x.min(2)) > 8).mean(1) > 0.2  # rows of pixels that run through pictures, not labels
    changes = (x[inked][:, 1:] != x[inked][:, :-1]).any(2).mean()
    assert inked.sum() > 100
    return changes < 1 / 6


def test_a_second_call_returns_the_record_and_the_model_without_work(
    finished: Path, tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(finished)
    for name in ("collect", "DenoisingTask", "write_results"):
        monkeypatch.setattr(api, name, lambda *args: pytest.fail("it worked again"))
    assert erase(tiny_pipe, "nudity", output_dir=finished, **QUICK) == json.loads((finished / "run.json").read_text())
    assert contents(finished) == before
    saved = UNet2DConditionModel.from_pretrained(finished, subfolder="unet")
    assert weights_hash(tiny_pipe.unet) == weights_hash(saved)


@pytest.mark.parametrize(
    ("change", "knob"),
    [
        ({"lr": 2e-4}, "lr 0.0001, not 0.0002"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"trim_scope": "kv"}, "trim_scope attn"),
    ],
)
def test_another_configuration_in_the_folder_is_refused(
    finished: Path, tiny_pipe: StableDiffusionPipeline, change: dict, knob: str
) -> None:
    before, model = contents(finished), parts(tiny_pipe)
    with pytest.raises(UserError, match=knob):
        erase(tiny_pipe, "nudity", output_dir=finished, **QUICK | change)
    assert contents(finished) == before
    assert parts(tiny_pipe) == model


def test_another_model_in_the_folder_is_refused(finished: Path, tiny_pipe: StableDiffusionPipeline) -> None:
    tiny_pipe.unet.conv_in.bias.data += 1
    with pytest.raises(UserError, match="base_hash"):
        erase(tiny_pipe, "nudity", output_dir=finished, **QUICK)


@pytest.mark.parametrize("name", ["thesis.txt", "job.json", "config.json", "unet/config.json"])
def test_a_folder_with_other_files_is_refused_and_left_alone(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}.*name an"):
        erase(tiny_pipe, "cat", output_dir=tmp_path, **QUICK)
    assert contents(tmp_path) == {name: b"years of work"}


def test_a_file_instead_of_a_folder_is_refused(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        erase(tiny_pipe, "cat", output_dir=tmp_path / "x", **QUICK)


EARLY = [
    ({"concept": " "}, "concept is empty"),
    ({"train_scope": "everything"}, "unknown parameter group 'everything'"),
    ({"rank_scope": "re:("}, "not a regular expression"),
    ({"trim_scope": "re:norm1"}, "--trim_scope re:norm1 holds norms only"),
    ({"preset": "sd", "trim_scope": "xattn", "train_scope": "selfattn"}, "which --train_scope selfattn never repairs"),
    ({"trim_scope": "full", "train_scope": "xattn"}, "--trim_scope full re-initialises"),
    ({"preset": "authors-nsfw", "train_scope": "xattn"}, "--trim_scope authors re-initialises"),
    ({"preset": "best"}, "unknown preset 'best'"),
    ({"model": "pocket"}, "the pocket model has no concept 'dragon'"),
    ({"kind": "auto", "concept": "x" * 300}, "300 characters"),
]


@pytest.mark.parametrize(("given", "message"), EARLY, ids=[m for _, m in EARLY])
def test_what_cannot_work_is_refused_before_anything_is_sampled_or_written(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict, message: str
) -> None:
    monkeypatch.setattr(concept, "sample", lambda *args, **options: pytest.fail("an image was sampled"))
    with pytest.raises(UserError, match=message):
        erase(tiny_pipe, **{"concept": "dragon", "output_dir": tmp_path / "run"} | QUICK | given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "a EDMEulerScheduler, adds noise"),
        (EDMDPMSolverMultistepScheduler(), "a EDMDPMSolverMultistepScheduler, adds noise"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "a UniPCMultistepScheduler with use_flow_sigmas"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "a EulerDiscreteScheduler with continuous timesteps"),
    ],
)
def test_an_unknown_forward_process_is_refused_by_name_before_anything_is_sampled(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, scheduler: SchedulerMixin, message: str
) -> None:
    monkeypatch.setattr(concept, "sample", lambda *args, **options: pytest.fail("an image was sampled"))
    tiny_pipe.scheduler = scheduler
    with pytest.raises(UserError, match=message):
        erase(tiny_pipe, "dragon", **QUICK)


def test_half_precision_weights_are_refused(tiny_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(UserError, match="float32"):
        erase(tiny_pipe.to(torch.float16), "cat", **QUICK)


def failed(folder: Path, message: str) -> None:
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 2)
    assert message in status["message"]
    assert not (folder / "unet").exists()
    assert not (folder / "run.json").exists()


@pytest.mark.parametrize("steps", [1, 4], ids=["in the last step", "on the way"])
def test_a_model_that_explodes_is_never_saved(tiny_pipe: StableDiffusionPipeline, tmp_path: Path, steps: int) -> None:
    with pytest.raises(UserError, match="nothing was saved; lower --lr"):
        erase(
            tiny_pipe, "cat", output_dir=tmp_path / "run", **QUICK | {"lr": 1e38, "steps": steps, "optimizer": "sgd"}
        )
    failed(tmp_path / "run", "lower --lr")


def test_without_a_folder_an_exploded_model_is_an_error_too(tiny_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(UserError, match="lower --lr"):
        erase(tiny_pipe, "cat", **QUICK | {"lr": 1e38, "steps": 1, "optimizer": "sgd"})


def test_nan_weights_in_the_loop_stop_it_and_keep_the_last_good_checkpoint(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show, unet = loop.show, tiny_pipe.unet

    def poison(bar, record):
        show(bar, record)
        if record.get("step") == 1:
            unet.conv_out.weight.data[0, 0] = torch.nan

    monkeypatch.setattr(loop, "show", poison)
    with pytest.raises(UserError, match="after 2 steps conv_out.weight holds NaN"):
        erase(tiny_pipe, "cat", output_dir=tmp_path / "run", **QUICK)
    failed(tmp_path / "run", "conv_out.weight")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-000001"]


def test_a_defect_of_ours_is_told_apart_from_the_users(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_):
        raise KeyError("oh")

    monkeypatch.setattr(api, "collect", broken)
    with pytest.raises(KeyError):
        erase(tiny_pipe, "cat", output_dir=tmp_path / "run", **QUICK)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 1)
    assert "KeyError" in status["message"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_unet_bit_for_bit(
    finished: Path, tiny_pipe, tiny_sd: Path, tmp_path: Path
) -> None:
    torch.rand(5)
    erase(tiny_pipe, "nudity", output_dir=tmp_path / "again", **QUICK)
    assert file_digest(tmp_path / "again" / WEIGHTS) == file_digest(finished / WEIGHTS)
    saved = UNet2DConditionModel.from_pretrained(finished, subfolder="unet")
    assert weights_hash(tiny_pipe.unet) == weights_hash(saved)
    other = load(str(tiny_sd))
    erase(other, "nudity", seed=1, **QUICK)
    assert weights_hash(other.unet) != weights_hash(saved)


def test_an_interrupted_run_goes_on_bit_for_bit(
    finished: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show, seen = loop.show, []

    def interrupt(bar, record):
        show(bar, record)
        seen.append(record)
        if record.get("step") == 1 and len(seen) < 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        erase(load(str(tiny_sd)), "nudity", output_dir=tmp_path / "run", **QUICK)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    monkeypatch.setattr(loop, "show", show)
    erase(load(str(tiny_sd)), "nudity", output_dir=tmp_path / "run", **QUICK)
    assert file_digest(tmp_path / "run" / WEIGHTS) == file_digest(finished / WEIGHTS)
    assert (tmp_path / "run/trace.csv").read_text() == (finished / "trace.csv").read_text()
    assert set(contents(tmp_path / "run")) == FILES


def test_mixed_precision_is_recorded_and_edits_fp32_weights(tiny_pipe: StableDiffusionPipeline) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    record = erase(tiny_pipe, "cat", accelerator=accelerator, **QUICK)
    assert record["config"]["mixed_precision"] == "bf16"
    assert tiny_pipe.unet.dtype == torch.float32


def test_the_record_names_the_pipeline_it_was_given(
    tiny_pipe: StableDiffusionPipeline, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    monkeypatch.setattr(api, "carry_out", lambda pipe, plan, accelerator: plans.append(plan))
    erase(tiny_pipe, "cat")
    erase(tiny_pipe, "cat", model="owner/name")
    tiny_pipe.register_to_config(_name_or_path=str(POCKET))
    erase(tiny_pipe, "cat")
    assert [plan.job.model for plan in plans] == [str(tiny_sd), "owner/name", "pocket"]
    assert [plan.job.preset for plan in plans] == ["sd", "sd", "pocket"]


@pytest.mark.parametrize(
    "family",
    [StableDiffusionPipeline, AutoPipelineForText2Image, StableDiffusionImg2ImgPipeline],
    ids=lambda f: f.__name__,
)
def test_the_saved_unet_samples_in_every_pipeline(finished: Path, tiny_sd: Path, family: type) -> None:
    unet = UNet2DConditionModel.from_pretrained(str(finished), subfolder="unet")
    assert weights_hash(load(str(tiny_sd), unet=str(finished)).unet) == weights_hash(unet)
    pipe = family.from_pretrained(tiny_sd, unet=unet)
    assert pipe.unet is unet
    assert "_name_or_path" not in json.loads((finished / "unet/config.json").read_text())
    start = {"image": Image.new("RGB", (64, 64), "teal"), "strength": 0.5} if "Img2Img" in family.__name__ else {}
    image = pipe("a dog", num_inference_steps=4, generator=torch.Generator().manual_seed(0), **start).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1
