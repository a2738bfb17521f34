"""The names and shapes that CompVis' and Stability AI's code gives to the weights of Stable Diffusion 1, 2 and XL.

    model.diffusion_model.        the UNet: blocks numbered through, each a resnet (0), attention (1), a resampling
    first_stage_model.            the VAE: levels counted from the image on both sides, attention as 1 x 1 convolutions
    cond_stage_model.transformer. SD 1: OpenAI's CLIP ViT-L, as transformers names it
    cond_stage_model.model.       SD 2: OpenCLIP's ViT-H, queries, keys and values in one matrix
    conditioner.embedders.0.transformer.  and  .1.model.  SD XL: both kinds, ViT-L and OpenCLIP's ViT-bigG

Written from the modules themselves: openaimodel.py and diffusionmodules/model.py of CompVis/stable-diffusion,
encoders/modules.py of Stability-AI/generative-models, transformer.py of mlfoundations/open_clip. OpenCLIP's last
block of ViT-H, its text projection and its logit scale are not there for SD 2, of which diffusers keeps none and
Stable Diffusion reads none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from erase_sd.common.errors import UserError
from erase_sd.exports.base import Weights
from erase_sd.models.ldm_names import split, unet_modules, unet_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def checkpoint(pipe: DiffusionPipeline) -> Weights:
    """Return every weight of a pipeline under its LDM name.

    Raises UserError for a pipeline or a tensor that has no place in this layout.
    """
    weights = _prefixed(unet(pipe.unet.state_dict(), pipe.unet.config), "model.diffusion_model.")
    weights |= _prefixed(vae(pipe.vae.state_dict(), pipe.vae.config), "first_stage_model.")
    first = pipe.text_encoder
    if type(pipe).__name__ == "StableDiffusionXLPipeline":
        weights |= _prefixed(openai_clip(first.state_dict()), "conditioner.embedders.0.transformer.")
        weights |= _prefixed(open_clip(pipe.text_encoder_2.state_dict()), "conditioner.embedders.1.model.")
        weights |= _markers(pipe.scheduler.config)
    elif is_open_clip(first.config):
        weights |= _prefixed(open_clip(first.state_dict()), "cond_stage_model.model.")
    else:
        weights |= _prefixed(openai_clip(first.state_dict()), "cond_stage_model.transformer.")
    return weights


def is_open_clip(config: Any) -> bool:
    """Tell OpenCLIP's encoders, whose activation is the exact GELU, from OpenAI's with the quick one."""
    return config.hidden_act == "gelu"


def unet(state: Weights, config: Mapping[str, Any]) -> Weights:
    """Return a UNet's weights under LDM's names; every shape stays. Raises UserError as `unet_modules` does."""
    modules = unet_modules(config)
    return {unet_name(name, modules): x for name, x in state.items()}


def vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Map diffusers' names of a VAE's modules to LDM's."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names[f"{side}.conv_in"] = f"{side}.conv_in"
        names[f"{side}.mid_block.resnets.0"] = f"{side}.mid.block_1"
        names[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        names[f"{side}.mid_block.resnets.1"] = f"{side}.mid.block_2"
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names[f"{side}.conv_out"] = f"{side}.conv_out"
    for level in range(levels):
        up = levels - 1 - level  # LDM counts a decoder's levels from the image
        for layer in range(layers + 1):  # an encoder's level has one fewer
            names[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            names[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{up}.block.{layer}"
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return names


def vae(state: Weights, config: Mapping[str, Any]) -> Weights:
    """Return a VAE's weights under LDM's names: its attention's matrices (C, C) become convolutions (C, C, 1, 1)."""
    modules = vae_modules(config)
    weights = {}
    for name, x in state.items():
        module, rest = split(name, modules, "VAE")
        part, _, kind = rest.rpartition(".")
        if ".attentions." in module:
            rest = f"{VAE_ATTENTION[part]}.{kind}"
            x = x[:, :, None, None] if x.ndim == 2 else x
        elif part == "conv_shortcut":
            rest = f"nin_shortcut.{kind}"
        weights[f"{modules[module]}.{rest}"] = x
    return weights


def openai_clip(state: Weights) -> Weights:
    """Return the weights of OpenAI's CLIP under the names of transformers before 5.6, with their prefix."""
    return {"text_model." + name.removeprefix("text_model."): x for name, x in state.items()}


def open_clip(state: Weights) -> Weights:
    """Return a text encoder's weights as OpenCLIP has them.

    A block's queries, keys and values, (C, C) each, become in_proj, (3 C, C); the text projection, a Linear's (P, C),
    becomes the matrix (C, P) that its input is multiplied with.
    """
    state = {name.removeprefix("text_model."): x for name, x in state.items()}
    weights = {}
    for name, x in state.items():
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            weights[_known(name, OPEN_CLIP)] = x.T if name == "text_projection.weight" else x
            continue
        number, part, kind = block.groups()
        place = f"transformer.resblocks.{number}"
        if part == "self_attn.q_proj":
            parts = [state[f"encoder.layers.{number}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            weights[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            weights[f"{place}.{_known(part, OPEN_CLIP_BLOCK)}.{kind}"] = x
    return weights


def _markers(scheduler: Mapping[str, Any]) -> Weights:
    """Empty tensors by which ComfyUI and A1111 tell an XL model that predicts velocity; SD 2's they recognise."""
    if scheduler.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if scheduler.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: torch.zeros(0) for name in names}


def _known(name: str, names: dict[str, str]) -> str:
    if name not in names:
        raise UserError(f"the text encoder's {name} has no place in the LDM layout: use --to pipeline")
    return names[name]


def _prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: x for name, x in weights.items()}
