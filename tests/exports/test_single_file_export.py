"""A run as one checkpoint in the LDM layout."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from erase_sd.common.errors import UserError
from erase_sd.export import main
from erase_sd.exports import single_file
from tests.exports.conftest import Run, export, picture, same_weights, wanted
from tests.exports.ldm_table import detected, unet_table

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    root = tmp_path_factory.mktemp("files")
    return {run: export(run, "single-file", root / f"{kind}.safetensors") for kind, run in runs.items()}


def opened(run: Run, path: Path, dtype: torch.dtype = torch.float32):
    kind = type(run.erased())
    left_out = {"safety_checker": None} if kind.__name__ == "StableDiffusionPipeline" else {}
    return kind.from_single_file(str(path), config=str(run.base), local_files_only=True, dtype=dtype, **left_out)


def test_it_draws_what_the_run_draws(run: Run, files: dict[Run, Path]) -> None:
    pipe = opened(run, files[run])
    assert np.array_equal(picture(pipe), wanted(run))
    for part in [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]:
        assert same_weights(getattr(pipe, part), getattr(run.erased(), part))


def test_half_precision(sd1: Run, tmp_path: Path) -> None:
    path = export(sd1, "single-file", tmp_path / "cat.safetensors", "--dtype", "fp16")
    assert same_weights(opened(sd1, path, torch.float16).unet, copy.deepcopy(sd1.erased().unet).half())


def test_a_loader_that_tells_the_architecture_from_the_keys_finds_every_one(run: Run, files: dict[Run, Path]) -> None:
    tensors = load_file(files[run])
    unet = {name.removeprefix(PREFIX): x.shape for name, x in tensors.items() if name.startswith(PREFIX)}
    assert unet_table(detected(unet)) == {name: tuple(shape) for name, shape in unet.items()}


def test_the_text_encoders_have_their_makers_layouts(runs: dict[str, Run], files: dict[Run, Path]) -> None:
    tensors = {kind: load_file(files[run]) for kind, run in runs.items()}
    block = "transformer.resblocks.1.attn.in_proj_weight"
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in tensors["sd1"]
    assert tensors["sd2"][f"cond_stage_model.model.{block}"].shape == (96, 32)
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in tensors["sdxl"]
    assert tensors["sdxl"][f"conditioner.embedders.1.model.{block}"].shape == (144, 48)
    assert tensors["sdxl"]["conditioner.embedders.1.model.text_projection"].shape == (48, 40)


def test_the_metadata_says_what_it_is(run: Run, files: dict[Run, Path]) -> None:
    with safe_open(files[run], "pt") as file:
        facts = file.metadata()
    assert facts["erase_sd.concept"] == "cat"
    assert facts["erase_sd.base"] == run.base.name
    velocity = run.erased().scheduler.config.prediction_type == "v_prediction"
    assert facts["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
    assert str(run.base.parent) not in str(facts)


def test_a_file_that_does_not_come_back_is_not_written(
    sd1: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = single_file.checkpoint

    def swapped(pipe):
        weights = good(pipe)
        one, other = (f"{PREFIX}input_blocks.{i}.1.norm.weight" for i in (4, 5))
        weights[one] = weights[other] + 1
        return weights

    monkeypatch.setattr(single_file, "checkpoint", swapped)
    with pytest.raises(UserError, match=r"unet down_blocks\.1\.attentions\.0\.norm\.weight does not survive"):
        export(sd1, "single-file", tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_transformer_has_no_such_layout(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to single-file is for UNets"):
        main(
            [
                str(tiny_sd3),
                "--model",
                str(tiny_sd3),
                "--to",
                "single-file",
                "--output",
                str(tmp_path / "a.safetensors"),
            ]
        )


def test_blocks_that_ldm_does_not_have(sd1: Run) -> None:
    from erase_sd.exports.ldm import unet, unet_modules

    config = dict(sd1.erased().unet.config)
    with pytest.raises(UserError, match="AttnDownBlock2D has no LDM layout"):
        unet_modules(config | {"down_block_types": ("AttnDownBlock2D",) * 4})
    with pytest.raises(UserError, match=r"class_embedding\.weight has no place"):
        unet({"class_embedding.weight": torch.zeros(1)}, config)
