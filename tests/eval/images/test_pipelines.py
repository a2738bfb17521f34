"""Pipelines to sample: a scheduler of another class keeps to what latent diffusion models need."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import EulerDiscreteScheduler

from eval.images.pipelines import load, origin

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def with_scheduler(tiny_sd: Path, folder: Path, config: dict) -> Path:
    """A copy of the tiny model with another scheduler_config.json."""
    shutil.copytree(tiny_sd, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def euler(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own scheduler knows nothing of DDIM's keys."""
    config = {"_class_name": "EulerDiscreteScheduler", **BETAS}
    return with_scheduler(tiny_sd, tmp_path_factory.mktemp("models") / "euler", config)


def config_of(model: Path, scheduler: str | None) -> dict:
    return load(str(model), unet=None, transformer=None, dtype="float32", scheduler=scheduler).scheduler.config


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ddim", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("ddpm", {"clip_sample": False, "steps_offset": 1}),
        ("pndm", {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}),
    ],
)
def test_schedulers_of_pixels_get_the_keys_of_latents(euler: Path, name: str, keys: dict):
    config = config_of(euler, name)
    assert {key: config[key] for key in keys} == keys
    assert config["beta_end"] == BETAS["beta_end"]


def test_what_a_model_stores_comes_first(tiny_sd: Path, tmp_path: Path):
    stored = {"_class_name": "EulerDiscreteScheduler", **BETAS, "set_alpha_to_one": True}
    config = config_of(with_scheduler(tiny_sd, tmp_path / "model", stored), "ddim")
    assert config["set_alpha_to_one"] is True
    assert config["clip_sample"] is False


def test_the_model_s_own_class_stays_as_it_is(tiny_sd: Path, tmp_path: Path):
    model = with_scheduler(tiny_sd, tmp_path / "model", {"_class_name": "DDIMScheduler", **BETAS})
    own, named = config_of(model, None), config_of(model, "ddim")
    assert own["set_alpha_to_one"] is True
    assert named["set_alpha_to_one"] is True


def test_other_schedulers_keep_their_defaults(euler: Path):
    config = config_of(euler, "lms")
    assert config["steps_offset"] == EulerDiscreteScheduler().config["steps_offset"] == 0


def test_pndm_evaluates_the_network_once_a_step_and_once_more(euler: Path):
    """Runge-Kutta steps at the start, PNDM's default, would make 59 evaluations of 50 steps."""
    pipe = load(str(euler), unet=None, transformer=None, dtype="float32", scheduler="pndm")
    pipe.scheduler.set_timesteps(50)
    assert len(pipe.scheduler.timesteps) == 51


def test_a_hub_id_is_resolved_to_its_commit(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_sd, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = origin("me/tiny", unet="me/tiny", transformer=None, scheduler=None)
    assert found["model_revision"] == commit
    assert found["weights_revision"] == commit
    assert found["model_sha256"] is None
    assert found["sampler"]["class"] == "PNDMScheduler"
