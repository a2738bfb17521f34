"""Other projects' files where a model is named: generation, grids, attacks, erasing, eval-unlearn's technique."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase_sd.api import erase
from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load
from erase_sd.technique import ScissorhandsTechnique
from erase_sd.train import main as train
from eval.attack import ATTACKED, ORIGINAL, AttackJob, _models
from eval.generate import Generation, generate
from eval.grid import Grid, columns
from eval.images.pipelines import load as load_judged
from tests.models.foreign.conftest import differing

QUICK = {"steps": 1, "forget_images": 2, "retain_images": 2, "sample_steps": 1, "picture_steps": 1, "batch_size": 2}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def uce(theirs: dict[str, Tensor], tmp_path: Path) -> Path:
    part = {name: 0.1 * x for name, x in theirs.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    save_file(part, tmp_path / "uce.safetensors")
    return tmp_path / "uce.safetensors"


@pytest.fixture
def encoder(their_encoder: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file({name: 0.1 * x for name, x in their_encoder.items()}, tmp_path / "te.safetensors")
    return tmp_path / "te.safetensors"


def asked(model: Path, place: Path, **more: object) -> Generation:
    return Generation(prompts="cat", model=str(model), output_dir=str(place), rows=1, steps=1, size=64, **more)


def test_generation_says_the_file_and_its_hash(tiny_sd: Path, uce: Path, encoder: Path, tmp_path: Path, capsys):
    options = asked(tiny_sd, tmp_path / "gen", unet=str(uce), text_encoder=str(encoder))
    made = generate(options).generation
    assert made["weights"] == "uce.safetensors + te.safetensors"
    assert "uce.safetensors: UCE, 32 of 684 tensors of the UNet" in capsys.readouterr().err
    weights = load_file(uce)
    save_file({name: x + 1 for name, x in weights.items()}, uce)
    with pytest.raises(UserError, match="unet_sha256"):
        generate(options)


def test_a_refused_file_leaves_no_record(tiny_sd: Path, encoder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="give it as --text_encoder"):
        generate(asked(tiny_sd, tmp_path / "gen", unet=str(encoder)))
    assert not (tmp_path / "gen" / "generation.json").exists()


def test_an_erased_pipeline_is_no_original(tiny_sd: Path, tmp_path: Path):
    made = generate(asked(tiny_sd, tmp_path / "gen", original="base")).generation
    assert made["weights"] == str(tiny_sd)


def test_a_grid_has_a_column_for_each():
    options = Grid(model="m", unet=("e.pt",), text_encoder=("t.pt",), adapter=("l.safetensors",), models=("peer",))
    base, unet, encoder, adapter, peer = columns(options)
    assert base.unet is None
    assert unet.unet == "e.pt"
    assert encoder.text_encoder == "t.pt"
    assert adapter.adapter == ("l.safetensors",)
    assert (peer.model, peer.original) == ("peer", "m")


@pytest.mark.parametrize("positional", [True, False])
def test_an_attack_attacks_the_file_in_the_base(tiny_sd: Path, uce: Path, positional: bool):
    given = {"concept": "cat", "judge": "nudenet"}
    if positional:
        job = AttackJob(model=str(uce), original=str(tiny_sd), **given)
    else:
        job = AttackJob(model=str(tiny_sd), unet=str(uce), **given)
    models = _models(job)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(models[ATTACKED].load().unet.state_dict()[key], load_file(uce)[key])
    assert torch.equal(models[ORIGINAL].load().unet.state_dict()[key], load(str(tiny_sd)).unet.state_dict()[key])
    assert models[ATTACKED].sha256 != models[ORIGINAL].sha256


def test_erasing_starts_from_what_is_named(tiny_sd: Path, uce: Path, encoder: Path, tmp_path: Path):
    run = tmp_path / "run"
    given = {"unet": str(uce), "text_encoder": str(encoder), "model": str(tiny_sd)}
    record = erase(load(str(tiny_sd)), "cat", method="esd", preset="sd", output_dir=run, **given, **QUICK)
    assert record["config"]["unet"] == str(uce)
    assert str(tmp_path) not in (run / "README.md").read_text()
    assert (run / "text_encoder" / "model.safetensors").is_file()
    pipe = load_judged(str(tiny_sd), unet=str(run), transformer=None, dtype="float32", scheduler=None)
    held = {name.removeprefix("text_model."): x for name, x in pipe.text_encoder.state_dict().items()}
    assert differing(held, load_file(encoder)) == set()
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    start, end = load_file(uce)[key], pipe.unet.state_dict()[key]
    base = load(str(tiny_sd)).unet.state_dict()[key]
    assert (end - start).abs().max() < (base - start).abs().max() / 10


def test_runs_without_a_start_are_the_runs_that_they_were(tiny_sd: Path):
    record = erase(load(str(tiny_sd)), "cat", method="esd", preset="sd", **QUICK)
    assert not {"unet", "text_encoder", "adapter"} & record["config"].keys()


def test_the_technique_is_found_and_draws(tiny_sd: Path, uce: Path):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["eval_unlearn.techniques"]
    made = EntryPoint("scissorhands", entry["scissorhands"], "eval_unlearn.techniques").load()
    technique = made(
        model_id=str(tiny_sd), unet=str(uce), num_inference_steps=1, device="cpu", erase_concept="cat", batch_size=3
    )
    one, two = technique.generate(["a cat", "a cat"], seed=5, unknown=1)
    assert one.size == (64, 64)
    assert one.tobytes() != two.tobytes()
    assert technique.generate(["a cat"], seed=6)[0].size == two.size


def test_the_technique_without_anything_is_refused():
    with pytest.raises(UserError, match="names no unet"):
        ScissorhandsTechnique("pocket")


def test_a_run_that_would_lose_an_adapters_part_is_refused(tiny_sd: Path, tmp_path: Path):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 32), f"{name}.lora_up.weight": torch.ones(32, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="does not store the text_encoder"):
        erase(load(str(tiny_sd)), "cat", adapter=(str(tmp_path / "a.safetensors"),))


@pytest.mark.parametrize("option", ["--unet", "--text_encoder", "--adapter"])
def test_the_job_says_what_is_not_there_before_it_loads(tiny_sd: Path, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("erase_sd.train.load", lambda *_, **__: pytest.fail("it loaded the model"))
    with pytest.raises(UserError, match=rf"{option} no/such\.pt does not exist"):
        train(["--concept", "cat", "--model", str(tiny_sd), option, "no/such.pt"])
