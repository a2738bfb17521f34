"""The exact difference of a run, applied and undone."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.export import main
from erase_sd.exports.delta import apply_delta, difference, fingerprint, read_delta, restore_delta
from erase_sd.models.pipeline import load, load_network
from tests.exports.conftest import Run, export, picture, same_weights, wanted


@pytest.fixture(scope="module")
def deltas(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    root = tmp_path_factory.mktemp("deltas")
    return {run: export(run, "delta", root / f"{kind}.safetensors") for kind, run in runs.items()}


@pytest.fixture
def delta(sd1: Run, deltas: dict[Run, Path], tmp_path: Path) -> Path:
    """One of a test's own."""
    return Path(shutil.copy(deltas[sd1], tmp_path / "cat.safetensors"))


def test_applied_it_draws_what_the_run_draws(run: Run, deltas: dict[Run, Path], tmp_path: Path) -> None:
    assert main(["--apply", str(deltas[run]), "--model", str(run.base), "--output", str(tmp_path / "out")]) == 0
    pipe = load(str(run.base), unet=str(tmp_path / "out"))
    assert same_weights(pipe.unet, run.erased().unet)
    assert np.array_equal(picture(pipe), wanted(run))


def test_undone_it_is_the_base_to_the_bit(run: Run, deltas: dict[Run, Path], tmp_path: Path) -> None:
    assert main(["--restore", str(deltas[run]), "--model", str(run.folder), "--output", str(tmp_path / "out")]) == 0
    restored = load_network(str(tmp_path / "out"), "unet", torch.float32)
    assert same_weights(restored, run.original().unet)


def test_there_and_back_in_memory(sd1: Run, delta: Path) -> None:
    unet = copy.deepcopy(sd1.original().unet)
    apply_delta(read_delta(delta), unet)
    assert same_weights(unet, sd1.erased().unet)
    restore_delta(read_delta(delta), unet)
    assert same_weights(unet, sd1.original().unet)


def test_signs_of_zero_and_odd_bits_survive() -> None:
    base, erased = nn.Linear(4, 1), nn.Linear(4, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.0, -0.0, 1e-45, 1.0]]))
        erased.weight.copy_(torch.tensor([[-0.0, 0.0, 0.0, 1.0]]))
        erased.bias.copy_(base.bias)
    found = difference(base.state_dict(), erased.state_dict())
    assert found.keys() == {"weight.bits"}
    assert found["weight.bits"].tolist() == [[-(2**31), -(2**31), 1, 0]]


def test_few_changes_are_stored_by_their_places(sd1: Run, delta: Path) -> None:
    tensors = load_file(delta)
    sparse = {name.removesuffix(".places") for name in tensors if name.endswith(".places")}
    assert sparse
    assert all(".conv" in name for name in sparse)
    assert all(f"{name}.bits" in tensors for name in sparse)
    weight = sd1.erased().unet.get_parameter(min(sparse))
    assert len(tensors[f"{min(sparse)}.bits"]) == weight.numel() // 100


def test_only_what_changed_is_stored(sd1: Run, delta: Path) -> None:
    base, erased = sd1.original().unet.state_dict(), sd1.erased().unet.state_dict()
    changed = {name for name, x in erased.items() if not torch.equal(x, base[name])}
    assert {name.removesuffix(".bits").removesuffix(".places") for name in load_file(delta)} == changed


def test_the_header_names_the_base_and_no_path(sd1: Run, delta: Path) -> None:
    with safe_open(delta, "pt") as file:
        facts = file.metadata()
    assert facts["erase_sd.base_sha256"] == fingerprint(sd1.original().unet.state_dict())
    assert facts["erase_sd.concept"] == "cat"
    assert "/" not in str(facts)


def test_another_base_is_refused(sd1: Run, delta: Path, tmp_path: Path) -> None:
    pipe = copy.deepcopy(sd1.original())
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-7
    pipe.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="and this one has .* give the very model"):
        main(["--apply", str(delta), "--model", str(tmp_path / "other"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_undoing_on_the_base_is_refused(sd1: Run, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="carried out on this model already"):
        main(["--restore", str(delta), "--model", str(sd1.base), "--output", str(tmp_path / "out")])


def test_a_refusal_changes_nothing(runs: dict[str, Run], delta: Path) -> None:
    other = runs["sd2"].original().unet
    before = fingerprint(other.state_dict())
    with pytest.raises(UserError):
        apply_delta(read_delta(delta), other)
    assert fingerprint(other.state_dict()) == before


@pytest.mark.parametrize("damage", ["places", "bits", "name"])
def test_a_damaged_delta_is_refused(sd1: Run, delta: Path, damage: str) -> None:
    with safe_open(delta, "pt") as file:
        facts = file.metadata()
    tensors = load_file(delta)
    sparse = min(name for name in tensors if name.endswith(".places"))
    if damage == "places":
        tensors[sparse][0] = 2**30
    elif damage == "bits":
        tensors[sparse.replace(".places", ".bits")][0] ^= 1
    else:
        tensors["nowhere.bits"] = torch.zeros(1, dtype=torch.int32)
    save_file(tensors, delta, facts)
    with pytest.raises(UserError, match="is damaged"):
        apply_delta(read_delta(delta), copy.deepcopy(sd1.original().unet))


def test_what_is_no_delta_is_refused(sd1: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_delta(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="is no delta of ours"):
        read_delta(sd1.folder / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "text.safetensors").write_text("a text of some length")
    with pytest.raises(UserError, match="is damaged or no .safetensors file"):
        read_delta(tmp_path / "text.safetensors")
