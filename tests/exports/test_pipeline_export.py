"""A run as a pipeline folder."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTextModel

from erase_sd.common.errors import UserError
from erase_sd.exports.base import Erased, ExportSettings
from erase_sd.exports.pipeline import write_pipeline
from erase_sd.models.pipeline import load
from tests.exports.conftest import Run, export, picture, same_weights, wanted


@pytest.fixture(scope="module")
def folders(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Path]:
    """Every run with weights in full and, as a variant, in half precision."""
    root = tmp_path_factory.mktemp("pipelines")
    return {run: export(run, "pipeline", root / kind, "--dtype", "fp32", "fp16") for kind, run in runs.items()}


def keys(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def test_it_draws_what_the_run_draws(run: Run, folders: dict[Run, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(str(folders[run]))
    assert np.array_equal(picture(pipe), wanted(run))
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(pipe, part), getattr(run.erased(), part))


def test_clip_has_the_prefix_that_every_release_of_transformers_reads(run: Run, folders: dict[Run, Path]) -> None:
    for part in folders[run].glob("text_encoder*"):
        names = keys(part) - {"text_projection.weight"}
        assert names
        assert all(name.startswith("text_model.") for name in names)


def test_the_variant_is_the_same_in_half_precision(sd1: Run, folders: dict[Run, Path]) -> None:
    half = DiffusionPipeline.from_pretrained(str(folders[sd1]), variant="fp16", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(half, part), copy.deepcopy(getattr(sd1.erased(), part)).half())


def test_half_precision_alone_draws_without_a_dtype(sd1: Run, tmp_path: Path) -> None:
    out = export(sd1, "pipeline", tmp_path / "out", "--dtype", "fp16")
    pipe = DiffusionPipeline.from_pretrained(str(out), variant="fp16")
    assert np.abs(picture(pipe) - wanted(sd1)).max() < 0.02


def test_large_components_become_shards(sd1: Run, tmp_path: Path) -> None:
    out = export(sd1, "pipeline", tmp_path / "out", "--max_shard_size", "200KB", "--dtype", "fp32", "fp16")
    assert len(list((out / "unet").glob("*-of-*.safetensors"))) > 4
    full = DiffusionPipeline.from_pretrained(str(out))
    half = DiffusionPipeline.from_pretrained(str(out), variant="fp16")
    assert np.array_equal(picture(full), wanted(sd1))
    assert half.unet.state_dict().keys() == full.unet.state_dict().keys()


def test_no_path_of_this_machine_and_no_pickle(run: Run, folders: dict[Run, Path]) -> None:
    for path in folders[run].rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors", ".txt")
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text()
            assert str(run.base.parent) not in path.read_text()


def test_the_tokenizer_has_the_files_of_older_releases(sd1: Run, folders: dict[Run, Path]) -> None:
    folder = folders[sd1] / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == sd1.erased().tokenizer.get_vocab()
    assert (folder / "merges.txt").read_text().startswith("#version: 0.2\n")


def test_the_text_encoder_alone_loads(sd1: Run, folders: dict[Run, Path]) -> None:
    encoder = CLIPTextModel.from_pretrained(str(folders[sd1]), subfolder="text_encoder")
    assert same_weights(encoder, sd1.erased().text_encoder)


def test_weights_beyond_half_precision_are_refused(sd1: Run, tmp_path: Path) -> None:
    pipe = copy.deepcopy(sd1.erased())
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = 1e5
    erased = Erased(pipe=pipe, part="unet", name="cat")
    with pytest.raises(UserError, match=r"conv_in\.bias is not finite in torch\.float16"):
        write_pipeline(erased, tmp_path / "out", ExportSettings(dtype=("fp16",)))
    assert not list(tmp_path.iterdir())


def test_a_transformer_pipeline_loads_as_the_command_says(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export(Run(tiny_sd3, tiny_sd3), "pipeline", tmp_path / "out", "--model", str(tiny_sd3))
    code = capsys.readouterr().out.partition("\n\n")[2]
    assert "text_encoder_3=None" in code
    names: dict[str, DiffusionPipeline] = {}
    exec(code, names)
    assert same_weights(names["pipe"].transformer, load(str(tiny_sd3)).transformer)
