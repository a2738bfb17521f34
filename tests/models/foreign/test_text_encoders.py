"""Text encoders of other projects, in every layout that they are published in."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.models.foreign import Artefacts, put
from tests.models.foreign.conftest import copied, differing

Weights = dict[str, Tensor]


def line(pipe: StableDiffusionPipeline, source: object) -> str:
    return put(pipe, Artefacts(text_encoder=str(source)))[0].line


def held(pipe: StableDiffusionPipeline) -> Weights:
    return {name.removeprefix("text_model."): x for name, x in pipe.text_encoder.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["", "text_model.", "text_encoder.text_model.", "cond_stage_model.transformer.text_model."]
)
def test_the_prefix_is_found_out(
    tiny_pipe: StableDiffusionPipeline, their_encoder: Weights, tmp_path: Path, prefix: str
):
    torch.save({prefix + name: x for name, x in their_encoder.items()}, tmp_path / "te.pt")
    assert line(tiny_pipe, tmp_path / "te.pt") == "te.pt: a whole text encoder, 36 of 36 tensors"
    assert differing(held(tiny_pipe), their_encoder) == set()


def test_adv_unlearns_wrapper_has_every_tensor_twice(
    tiny_pipe: StableDiffusionPipeline, their_encoder: Weights, tmp_path: Path
):
    whole = {f"text_encoder.text_model.{name}": x for name, x in their_encoder.items()}
    again = {name: x.clone() for name, x in their_encoder.items()}
    positions = {"text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(again | whole | positions, tmp_path / "te.pt")
    assert "36 of 36" in line(tiny_pipe, tmp_path / "te.pt")
    assert differing(held(tiny_pipe), their_encoder) == set()


def test_a_file_may_hold_a_part(tiny_pipe: StableDiffusionPipeline, their_encoder: Weights, tmp_path: Path):
    before = copied(held(tiny_pipe))
    part = {name: x for name, x in their_encoder.items() if ".layers.0." in name}
    save_file({f"text_model.{name}": x for name, x in part.items()}, tmp_path / "hirm.safetensors")
    assert (
        line(tiny_pipe, tmp_path / "hirm.safetensors")
        == "hirm.safetensors: a part of a text encoder, 16 of 36 tensors"
    )
    assert differing(held(tiny_pipe), before | part) == set()


@pytest.mark.parametrize("inner", ["", "text_encoder"])
def test_a_folder_is_a_whole_encoder(
    tiny_pipe: StableDiffusionPipeline, their_encoder: Weights, tmp_path: Path, inner: str
):
    tiny_pipe.text_encoder.save_pretrained(str(tmp_path / inner))
    save_file({f"text_model.{name}": x for name, x in their_encoder.items()}, tmp_path / inner / "model.safetensors")
    assert "a whole text encoder" in line(tiny_pipe, tmp_path)
    assert differing(held(tiny_pipe), their_encoder) == set()


def test_a_partial_folder_is_refused_though_a_variant_is_whole(
    tiny_pipe: StableDiffusionPipeline, their_encoder: Weights, tmp_path: Path
):
    part = {name: x for name, x in their_encoder.items() if ".layers.0." not in name}
    save_file(part, tmp_path / "model.safetensors")
    save_file({name: x.half() for name, x in their_encoder.items()}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(UserError, match="16 of 36 tensors have no value"):
        line(tiny_pipe, tmp_path)


def test_a_folder_of_another_shape_is_refused(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    tiny_pipe.text_encoder.config.save_pretrained(str(tmp_path))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 768'))
    with pytest.raises(UserError, match="hidden_size 768 where the base has 32"):
        line(tiny_pipe, tmp_path)


def test_what_is_no_text_encoder_is_named(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    save_file({"mid_block.attn2.to_k.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"a UNet: give it as --unet: it holds mid_block\.attn2\.to_k\.weight \(2, 3\)"
    ):
        line(tiny_pipe, tmp_path / "x.safetensors")
