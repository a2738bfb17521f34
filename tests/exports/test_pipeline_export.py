"""A run as a pipeline folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTextModel

from erase_sd.export import main
from erase_sd.process import UserError
from tests.exports.conftest import Run, picture, same_weights


def exported(run: Run, output: Path, *words: str) -> Path:
    assert main([str(run.folder), "--to", "pipeline", "--output", str(output), *words]) == 0
    return output


def keys(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def test_it_draws_what_the_run_draws(run: Run, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(str(exported(run, tmp_path / "out")))
    assert np.array_equal(picture(pipe), picture(run.erased()))


def test_every_component_is_there_to_the_bit(run: Run, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(str(exported(run, tmp_path / "out")))
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(pipe, part), getattr(run.erased(), part))


def test_clip_has_the_prefix_that_every_release_of_transformers_reads(run: Run, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out")
    for part in out.glob("text_encoder*"):
        names = keys(part) - {"text_projection.weight"}
        assert names
        assert all(name.startswith("text_model.") for name in names)


def test_a_half_precision_variant_beside_the_full_one(sd1: Run, tmp_path: Path) -> None:
    out = exported(sd1, tmp_path / "out", "--dtype", "fp32", "fp16")
    full = DiffusionPipeline.from_pretrained(str(out))
    half = DiffusionPipeline.from_pretrained(str(out), variant="fp16", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(full, part).half(), getattr(half, part))


def test_half_precision_alone_draws_without_a_dtype(sd1: Run, tmp_path: Path) -> None:
    out = exported(sd1, tmp_path / "out", "--dtype", "fp16")
    pipe = DiffusionPipeline.from_pretrained(str(out), variant="fp16")
    assert np.abs(picture(pipe) - picture(sd1.erased())).max() < 0.02


def test_large_components_become_shards(sd1: Run, tmp_path: Path) -> None:
    out = exported(sd1, tmp_path / "out", "--max_shard_size", "200KB", "--dtype", "fp32", "fp16")
    assert len(list((out / "unet").glob("*-of-*.safetensors"))) > 4
    for variant in (None, "fp16"):
        pipe = DiffusionPipeline.from_pretrained(str(out), variant=variant)
        assert pipe.unet.state_dict().keys() == sd1.erased().unet.state_dict().keys()
    assert np.array_equal(picture(DiffusionPipeline.from_pretrained(str(out))), picture(sd1.erased()))


def test_no_path_of_this_machine_and_no_pickle(run: Run, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out")
    for path in out.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors", ".txt")
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text()
            assert str(run.base.parent) not in path.read_text()


def test_the_tokenizer_has_the_files_of_older_releases(sd1: Run, tmp_path: Path) -> None:
    folder = exported(sd1, tmp_path / "out") / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == sd1.erased().tokenizer.get_vocab()
    assert (folder / "merges.txt").read_text().startswith("#version: 0.2\n")


def test_the_text_encoder_alone_loads(sd1: Run, tmp_path: Path) -> None:
    out = exported(sd1, tmp_path / "out")
    encoder = CLIPTextModel.from_pretrained(str(out), subfolder="text_encoder")
    assert same_weights(encoder, sd1.erased().text_encoder)


def test_weights_beyond_half_precision_are_refused(sd1: Run, tmp_path: Path) -> None:
    from erase_sd.exports.base import Erased, ExportSettings
    from erase_sd.exports.pipeline import write_pipeline

    pipe = sd1.erased()
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = 1e5
    erased = Erased(pipe=pipe, part="unet", name="cat")
    with pytest.raises(UserError, match=r"conv_in\.bias is not finite in torch\.float16"):
        write_pipeline(erased, tmp_path / "out", ExportSettings(dtype=("fp16",)))
    assert not list(tmp_path.iterdir())
