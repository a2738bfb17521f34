"""The change of a run as adapters."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.exports.lora import adapters, factorise, low_rank, merged
from erase_sd.models.pipeline import load
from erase_sd.pocket import FOLDER
from tests.exports.conftest import Run, export, picture, wanted, write_run
from tests.exports.ldm_table import detected, unet_table

FULL = 32  # the narrowest and the widest matrix of the tiny networks need no more
DIFFUSERS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def adapted(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    """Every run's adapters of ranks 1, 8 and of full rank."""
    root, ranks = tmp_path_factory.mktemp("adapters"), ("1", "8", str(FULL))
    return {run: export(run, "lora", root / kind, "--partial", "--rank", *ranks) for kind, run in runs.items()}


def test_the_best_approximation_of_its_rank() -> None:
    delta = torch.randn(6, 4, 3, 3, generator=generator(0, "delta"), dtype=torch.float64)
    singular = torch.linalg.svdvals(delta.flatten(1))
    for rank in range(1, 7):
        up, down, energy = low_rank(delta, rank)
        rest = delta.flatten(1) - up @ down.flatten(1)
        assert torch.isclose(rest.square().sum(), singular[rank:].square().sum())
        assert torch.allclose(energy, singular.square())
        assert down.shape == (rank, 4, 3, 3)


def test_tall_matrices_are_no_different() -> None:
    delta = torch.randn(40, 5, generator=generator(0, "tall"), dtype=torch.float64)
    up, down, _ = low_rank(delta, 5)
    assert torch.allclose(up @ down, delta)
    assert torch.isclose(up.norm(), down.norm())


def test_kept_energy_is_what_the_merged_network_keeps(sd1: Run) -> None:
    base, erased = sd1.original().unet, sd1.erased().unet
    change = factorise(base, erased, 8)
    network = dict(merged(base, adapters(change, 8)).named_parameters())
    left = sum(float((x - network[name]).double().square().sum()) for name, x in erased.named_parameters())
    assert change.kept(8) == pytest.approx(1 - left / change.total, abs=1e-6)
    assert change.kept(1) < change.kept(2) < change.kept(8)


def test_the_rank_for_a_share_is_the_lowest(sd1: Run) -> None:
    change = factorise(sd1.original().unet, sd1.erased().unet, 1)
    rank = change.rank_for(0.95)
    assert change.kept(rank) >= 0.95 > change.kept(rank - 1)
    assert change.rank_for(1.0) <= FULL


def test_norms_and_biases_have_no_place(sd1: Run) -> None:
    base, erased = sd1.original().unet, copy.deepcopy(sd1.original().unet)
    with torch.no_grad():
        erased.conv_norm_out.weight += 1
        erased.conv_out.bias += 1
    change = factorise(base, erased, 4)
    assert change.factors == {}
    assert change.kept(4) == 0
    assert change.rank_for(0.5) is None


def test_a_network_that_is_the_base_is_refused(sd1: Run) -> None:
    unet = sd1.original().unet
    with pytest.raises(UserError, match="no change"):
        factorise(unet, unet, 4)


def with_adapter(run: Run, folder: Path, weight_name: str | None = None) -> DiffusionPipeline:
    pipe = copy.deepcopy(run.original())
    pipe.load_lora_weights(str(folder), weight_name=weight_name)
    return pipe


def test_diffusers_loads_it_and_the_drift_falls_with_the_rank(run: Run, adapted: dict[Run, Path]) -> None:
    pytest.importorskip("peft")
    pictures = [picture(with_adapter(run, adapted[run] / f"rank-{rank}")) for rank in (1, 8, FULL)]
    drift = [np.abs(image - wanted(run)).max() for image in pictures]
    assert drift[0] > drift[1] > drift[2]
    assert drift[2] < 1e-4
    assert drift[2] < drift[0] / 100


def test_kohyas_layout_is_the_same_adapter(run: Run, adapted: dict[Run, Path]) -> None:
    pytest.importorskip("peft")
    folder = adapted[run] / "rank-8"
    ours, kohyas = with_adapter(run, folder, DIFFUSERS), with_adapter(run, folder, "cat-rank-8.safetensors")
    assert kohyas.get_active_adapters()
    assert np.allclose(picture(kohyas), picture(ours), atol=1e-5)


def test_fused_it_is_the_run(sd1: Run, adapted: dict[Run, Path]) -> None:
    pytest.importorskip("peft")
    pipe = with_adapter(sd1, adapted[sd1] / f"rank-{FULL}")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    erased = sd1.erased().unet.state_dict()
    for name, x in pipe.unet.state_dict().items():
        assert torch.allclose(x, erased[name], atol=1e-5)


def test_comfyui_finds_every_module_of_kohyas_file(run: Run, adapted: dict[Run, Path]) -> None:
    """ComfyUI takes "lora_unet_" and a UNet's module by its LDM name, for SD 1 and 2 by diffusers' name as well."""
    unet = run.erased().unet
    modules = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if run.folder.name == "sdxl":
        from erase_sd.exports.ldm import checkpoint

        prefix = "model.diffusion_model."
        names = {name.removeprefix(prefix): x.shape for name, x in checkpoint(run.erased()).items() if prefix in name}
        modules = {name.removesuffix(".weight") for name in unet_table(detected(names)) if name.endswith(".weight")}
    known = {"lora_unet_" + name.replace(".", "_") for name in modules}
    tensors = load_file(adapted[run] / "rank-8" / "cat-rank-8.safetensors")
    assert {name.split(".")[0] for name in tensors} <= known
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_a_rank_that_keeps_too_little_is_refused(sd1: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--rank 1 keeps \d+\.\d % of the change.* --rank \d+ does; or give --to delta"
    ):
        export(sd1, "lora", tmp_path / "out", "--rank", "1")
    assert not list(tmp_path.iterdir())


def test_a_partial_adapter_says_so(sd1: Run, adapted: dict[Run, Path]) -> None:
    for rank, partial in ((1, "true"), (FULL, "false")):
        with safe_open(adapted[sd1] / f"rank-{rank}" / DIFFUSERS, "pt") as file:
            assert file.metadata()["erase_sd.partial"] == partial


def test_the_report_says_what_each_rank_keeps(sd1: Run, adapted: dict[Run, Path]) -> None:
    ranks = json.loads((adapted[sd1] / "lora.json").read_text())["ranks"]
    assert ranks["1"]["kept_energy"] < ranks["8"]["kept_energy"] < 1
    assert ranks[str(FULL)]["kept_energy"] == pytest.approx(1)
    assert ranks["1"]["output_error"] > ranks["8"]["output_error"] > ranks[str(FULL)]["output_error"]
    assert ranks[str(FULL)]["output_error"] < 1e-4


def test_half_precision_is_measured_as_it_is_written(sd1: Run, tmp_path: Path) -> None:
    out = export(sd1, "lora", tmp_path / "out", "--rank", str(FULL), "--dtype", "fp16")
    tensors = load_file(out / f"rank-{FULL}" / DIFFUSERS)
    assert all(x.dtype == torch.float16 for x in tensors.values())
    error = json.loads((out / "lora.json").read_text())["ranks"][str(FULL)]["output_error"]
    assert 1e-6 < error < 1e-2


def test_a_transformer_gets_diffusers_layout_only(tiny_sd3: Path, tmp_path: Path) -> None:
    from erase_sd.models.pipeline import save_network

    network = load(str(tiny_sd3)).transformer
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".attn.to_q.weight" in name:
                weight += torch.randn(weight.shape, generator=generator(0, name))
    save_network(network, tmp_path / "edited", "transformer")
    out = export(Run(tmp_path / "edited", tiny_sd3), "lora", tmp_path / "out", "--model", str(tiny_sd3))
    assert [path.name for path in (out / "rank-64").iterdir()] == [DIFFUSERS]
    assert all(name.startswith("transformer.") for name in load_file(out / "rank-64" / DIFFUSERS))


def test_on_the_pocket_model_every_rank_is_scored(tmp_path: Path) -> None:
    unet = load(str(FOLDER)).unet
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".attn2.to_v.weight" in name:
                weight.mul_(-1)
    counts = {"model": "pocket", "kind": "auto", "eval_forget": 2, "eval_retain": 2, "seed": 0}
    run = write_run(tmp_path / "run", FOLDER, unet, **counts)
    out = export(run, "lora", tmp_path / "out", "--rank", "96")
    scores = json.loads((out / "lora.json").read_text())["ranks"]["96"]["scores"]
    assert scores["n"] == {"forget": 2, "retain": 2}
    assert scores["concept"]["before"] == 1.0
    assert scores["retain"]["object"]["after"] <= scores["retain"]["object"]["before"]
