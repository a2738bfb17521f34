"""A run pushed to the Hub, of which a stand-in keeps what it was sent."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from erase_sd.common.errors import UserError
from erase_sd.export import main
from erase_sd.models import guidance
from erase_sd.models.guidance import SafetyGuidance, Settings
from erase_sd.models.pipeline import load
from tests.exports.conftest import Run, picture, wanted

REPO = "somebody/no-cats"


class FakeHub:
    """The three calls of HfApi that a push makes."""

    private: bool | None = None  # of a repository that is there already
    made: list[dict]
    folder: Path

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        FakeHub.made.append({"repo_id": repo_id, "private": private})
        FakeHub.private = private if FakeHub.private is None else FakeHub.private

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=FakeHub.private)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, FakeHub.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeHub]:
    FakeHub.private, FakeHub.made, FakeHub.folder = None, [], tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_the_pipeline_is_pushed_and_draws_what_the_run_draws(run: Run, hub: type[FakeHub]) -> None:
    assert main([str(run.folder), "--to", "hub", "--repo", REPO]) == 0
    assert hub.made == [{"repo_id": REPO, "private": True}]
    assert np.array_equal(picture(DiffusionPipeline.from_pretrained(str(hub.folder))), wanted(run))


def test_the_card_loads_it_from_the_hub_and_names_no_path_of_this_machine(sd1: Run, hub: type[FakeHub]) -> None:
    main([str(sd1.folder), "--to", "hub", "--repo", REPO])
    card = (hub.folder / "README.md").read_text()
    assert f"from_pretrained('{REPO}', dtype=torch.float32)" in card
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "UNet2DConditionModel" not in card
    for path in hub.folder.rglob("*"):
        assert path.is_dir() or str(sd1.folder.parent).encode() not in path.read_bytes()


def test_public_only_when_asked(sd1: Run, hub: type[FakeHub]) -> None:
    main([str(sd1.folder), "--to", "hub", "--repo", REPO, "--public"])
    assert hub.made == [{"repo_id": REPO, "private": False}]


def test_a_public_repository_that_is_there_is_refused(sd1: Run, hub: type[FakeHub]) -> None:
    hub.private = False
    with pytest.raises(UserError, match="exists and everybody sees it"):
        main([str(sd1.folder), "--to", "hub", "--repo", REPO])
    assert not hub.folder.exists()


@pytest.mark.parametrize(("repo", "said"), [([], "give --repo"), (["--repo", "cats"], "'cats' is no repository")])
def test_a_repository_has_to_be_named(sd1: Run, hub: type[FakeHub], repo: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main([str(sd1.folder), "--to", "hub", *repo])
    assert hub.made == []


def test_offline_is_one_sentence(sd1: Run) -> None:
    with pytest.raises(UserError, match=f"--repo {REPO} cannot be pushed to"):
        main([str(sd1.folder), "--to", "hub", "--repo", REPO])


@pytest.fixture
def guided(sd1: Run, tmp_path: Path) -> Run:
    """A run that stores guidance beside its network, as SLD does."""
    folder = tmp_path / "sld"
    shutil.copytree(sd1.folder, folder)
    settings = Settings(warmup=0, scale=1000.0, threshold=0.01, momentum_scale=0.3, momentum=0.4)
    text = {"encoder_hidden_states": torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))}
    guidance.save(SafetyGuidance(text, settings), folder)
    return Run(folder, sd1.base)


def test_guidance_is_pushed_beside_the_network(guided: Run, hub: type[FakeHub]) -> None:
    main([str(guided.folder), "--to", "hub", "--repo", REPO])
    pipe = load(str(guided.base), unet=str(hub.folder))
    assert np.array_equal(picture(pipe), picture(guided.erased()))
    assert f"unet='{REPO}'" in (hub.folder / "README.md").read_text()
    assert not (hub.folder / "model_index.json").exists()


@pytest.mark.parametrize("form", ["pipeline", "single-file", "delta", "lora", "pt"])
def test_formats_that_cannot_hold_guidance_say_so(guided: Run, tmp_path: Path, form: str) -> None:
    suffix = {"single-file": ".safetensors", "delta": ".safetensors", "pt": ".pt"}.get(form, "")
    with pytest.raises(UserError, match=f"keeps guidance beside its network, which --to {form} cannot hold"):
        main([str(guided.folder), "--to", form, "--output", str(tmp_path / f"out{suffix}")])
    assert not list(tmp_path.glob("out*"))
