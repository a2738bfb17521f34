"""A model in one .safetensors file, as CompVis and its successors wrote them, through the main job."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load
from erase_sd.run.record import weights_hash

UNET = [  # diffusers' name -> CompVis's, of blocks of two layers; applied in this order
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_in", lambda m: "input_blocks.0.0"),
    (r"^conv_norm_out", lambda m: "out.0"),
    (r"^conv_out", lambda m: "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.0\.upsamplers\.0", lambda m: "output_blocks.2.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2"),
    (r"(blocks?\.[\d.]+)\.norm1\.(?=\w+$)", lambda m: f"{m[1]}.in_layers.0."),
    (r"\.conv1\.", lambda m: ".in_layers.2."),
    (r"\.time_emb_proj\.", lambda m: ".emb_layers.1."),
    (r"(blocks?\.[\d.]+)\.norm2\.(?=\w+$)", lambda m: f"{m[1]}.out_layers.0."),
    (r"\.conv2\.", lambda m: ".out_layers.3."),
    (r"\.conv_shortcut\.", lambda m: ".skip_connection."),
]
VAE = [
    (r"conv_norm_out", lambda m: "norm_out"),
    (r"conv_shortcut", lambda m: "nin_shortcut"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"\.group_norm\.", lambda m: ".norm."),
    (r"\.to_([qkv])\.", lambda m: f".{m[1]}."),
    (r"\.to_out\.0\.", lambda m: ".proj_out."),
    (r"down_blocks\.(\d)\.resnets", lambda m: f"down.{m[1]}.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
]


def renamed(state: dict[str, torch.Tensor], rules: list, prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, x in state.items():
        inside = ".transformer_blocks." in name
        for pattern, to in rules if not inside else rules[:13]:
            name = re.sub(pattern, to, name)
        found[prefix + name] = x[:, :, None, None] if ".attn_1." in name and x.ndim == 2 else x
    return found


@pytest.fixture
def single(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """The tiny pipeline in CompVis's layout."""
    text = {name.removeprefix("text_model."): x for name, x in tiny_pipe.text_encoder.state_dict().items()}
    state = renamed(tiny_pipe.unet.state_dict(), UNET, "model.diffusion_model.")
    state |= renamed(tiny_pipe.vae.state_dict(), VAE, "first_stage_model.")
    state |= {f"cond_stage_model.transformer.text_model.{name}": x for name, x in text.items()}
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_single_file_is_the_same_model(tiny_pipe: StableDiffusionPipeline, tiny_sd: Path, single: Path) -> None:
    pipe = load(str(single), config=str(tiny_sd))
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(pipe, part)) == weights_hash(getattr(tiny_pipe, part))
    assert pipe.safety_checker is None
    assert len(pipe.tokenizer) == len(tiny_pipe.tokenizer)


def test_a_single_file_needs_a_layout(single: Path) -> None:
    with pytest.raises(UserError, match=r"model.safetensors does not say how it is laid out: give --model_config"):
        load(str(single))


def test_a_layout_that_does_not_exist(single: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model_config .*nowhere"):
        load(str(single), config=str(tmp_path / "nowhere"))


def test_pickles_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        load(str(tmp_path / "model.ckpt"), config=str(tiny_sd))


def test_a_file_cut_short(single: Path, tiny_sd: Path) -> None:
    single.write_bytes(single.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.safetensors is damaged or incomplete"):
        load(str(single), config=str(tiny_sd))
