"""Adapters: the weights are what diffusers' own loading and fusing make of the same file."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.models.foreign import Artefacts, put
from erase_sd.models.pipeline import load
from tests.models.foreign.conftest import copied, differing

Weights = dict[str, Tensor]
TARGETS = ["attn2.to_q", "attn2.to_out.0", "proj_in"]  # linear ones and a convolution
DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"


def line(pipe: StableDiffusionPipeline, source: object) -> str:
    return put(pipe, Artefacts(adapter=(str(source),)))[0].line


@pytest.fixture
def lora(tiny_sd: Path) -> Weights:
    """A LoRA of rank 2 by peft's names, neither half of which is zero."""
    unet = load(str(tiny_sd)).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    g = torch.Generator().manual_seed(2)
    return {name: torch.randn(x.shape, generator=g) for name, x in get_peft_model_state_dict(unet).items()}


def fused(tiny_sd: Path, folder: Path, scale: float = 1.0) -> Weights:
    """The UNet that diffusers makes of a file of weights, lora.safetensors."""
    pipe = load(str(tiny_sd))
    pipe.load_lora_weights(str(folder), weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return pipe.unet.state_dict()


def close(ours: Weights, theirs: Weights) -> bool:
    """Whether all tensors are equal but for the rounding of one product and one sum of fp32."""
    return all(torch.allclose(x, theirs[name], rtol=1e-5, atol=1e-5) for name, x in ours.items())


def test_diffusers_names(tiny_sd: Path, tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    before = copied(tiny_pipe.unet.state_dict())
    save_file({f"unet.{name}": x for name, x in lora.items()}, tmp_path / "lora.safetensors")
    said = line(tiny_pipe, tmp_path / "lora.safetensors")
    assert said == "lora.safetensors: LoRA, rank 2, 48 modules of the unet, strength 1"
    assert len(differing(tiny_pipe.unet.state_dict(), before)) == 48
    assert close(tiny_pipe.unet.state_dict(), fused(tiny_sd, tmp_path))


def test_kohyas_names_and_alpha(tiny_sd: Path, tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    kohya = convert_state_dict_to_kohya({f"unet.{name}": x for name, x in lora.items()})
    weights = {name: x.contiguous() for name, x in kohya.items()}
    for name in weights:
        if name.endswith(".alpha"):
            weights[name] = torch.tensor(0.5)
    save_file(weights, tmp_path / "lora.safetensors")
    assert "kohya's names" in line(tiny_pipe, tmp_path / "lora.safetensors")
    assert close(tiny_pipe.unet.state_dict(), fused(tiny_sd, tmp_path))


def test_strength(tiny_sd: Path, tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    save_file({f"unet.{name}": x for name, x in lora.items()}, tmp_path / "lora.safetensors")
    assert "strength 0.25" in line(tiny_pipe, f"{tmp_path / 'lora.safetensors'}@0.25")
    assert close(tiny_pipe.unet.state_dict(), fused(tiny_sd, tmp_path, 0.25))


def expected(pipe: StableDiffusionPipeline, lora: Weights, scale: float) -> Weights:
    """W + scale B A, written out for linear modules and 1 x 1 convolutions."""
    state = copied(pipe.unet.state_dict())
    for name, a in lora.items():
        module, _, half = name.partition(".lora_")
        if half == "A.weight":
            change = lora[f"{module}.lora_B.weight"][..., 0, 0] @ a[..., 0, 0] if a.ndim == 4 else None
            change = lora[f"{module}.lora_B.weight"] @ a if change is None else change[..., None, None]
            state[f"{module}.weight"] += scale * change
    return state


def test_a_folder_of_peft_with_its_alpha(tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    wanted = expected(tiny_pipe, lora, 6 / 2)
    save_file({f"base_model.model.{name}": x for name, x in lora.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    line(tiny_pipe, tmp_path)
    assert close(tiny_pipe.unet.state_dict(), wanted)


def test_the_alpha_of_diffusers_header(tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    wanted = expected(tiny_pipe, lora, 6 / 2)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file({f"unet.{name}": x for name, x in lora.items()}, tmp_path / "l.safetensors", header)
    line(tiny_pipe, tmp_path / "l.safetensors")
    assert close(tiny_pipe.unet.state_dict(), wanted)


def test_older_diffusers_names(tiny_pipe: StableDiffusionPipeline, lora: Weights, tmp_path: Path):
    wanted = expected(tiny_pipe, lora, 1)
    older = {}
    for name, x in lora.items():
        name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        name = name.replace(".to_q.lora.", ".processor.to_q_lora.").replace(
            ".to_out.0.lora.", ".processor.to_out_lora."
        )
        older[f"unet.{name}"] = x
    torch.save(older, tmp_path / "pytorch_lora_weights.bin")
    line(tiny_pipe, tmp_path / "pytorch_lora_weights.bin")
    assert close(tiny_pipe.unet.state_dict(), wanted)


def test_spm_has_rank_one_and_no_alpha(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    before = copied(tiny_pipe.unet.state_dict())
    down, up = torch.randn(1, 32), torch.randn(16, 1)
    save_file({f"{DOWN}k.lora_down.weight": down, f"{DOWN}k.lora_up.weight": up}, tmp_path / "spm.safetensors")
    said = line(tiny_pipe, tmp_path / "spm.safetensors")
    assert said.startswith("spm.safetensors: SPM or LoRA of rank 1, kohya's names, the same for every prompt, rank 1")
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert differing(tiny_pipe.unet.state_dict(), before) == {key}
    assert torch.allclose(tiny_pipe.unet.state_dict()[key], before[key] + up @ down, atol=1e-6)


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.",
    ],
)
def test_text_encoders_too(tiny_pipe: StableDiffusionPipeline, tmp_path: Path, prefix: str):
    weight = tiny_pipe.text_encoder.get_submodule(
        next(n for n, _ in tiny_pipe.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    ).weight
    before, down, up = weight.detach().clone(), torch.randn(2, 32), torch.randn(32, 2)
    save_file({f"{prefix}lora_down.weight": down, f"{prefix}lora_up.weight": up}, tmp_path / "te.safetensors")
    applied = put(tiny_pipe, Artefacts(adapter=(str(tmp_path / "te.safetensors"),)))[0]
    assert applied.parts == {"text_encoder"}
    assert torch.allclose(weight, before + up @ down, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({f"{DOWN}x.lora_down.weight": (2, 32), f"{DOWN}x.lora_up.weight": (16, 2)}, "1 of its 1 modules are none"),
        (
            {f"{DOWN}k.lora_down.weight": (2, 768), f"{DOWN}k.lora_up.weight": (320, 2)},
            r"\(2, 768\).* weight \(16, 32\)",
        ),
        ({f"{DOWN}k.lora_down.weight": (2, 32)}, "no plain LoRA"),
        (
            {f"{DOWN}k.lora_down.weight": (2, 32), f"{DOWN}k.lora_up.weight": (16, 2), f"{DOWN}k.dora_scale": (16,)},
            "dora",
        ),
        ({f"{DOWN}k.hada_w1_a": (2, 2)}, "is no LoRA: it holds .*hada_w1_a"),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, weights: dict[str, tuple], match: str
):
    before = copied(tiny_pipe.unet.state_dict())
    save_file({name: torch.ones(shape) for name, shape in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=match):
        line(tiny_pipe, tmp_path / "x.safetensors")
    assert differing(tiny_pipe.unet.state_dict(), before) == set()


def test_a_strength_that_is_none(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    save_file({f"{DOWN}k.lora_down.weight": torch.ones(2, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="'half' is no strength"):
        line(tiny_pipe, f"{tmp_path / 'x.safetensors'}@half")
