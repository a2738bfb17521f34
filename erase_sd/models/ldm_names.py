"""The names that CompVis' and Stability AI's code gives to the weights of a UNet, from diffusers' names.

Blocks are numbered through; each is a resnet (0), attention (1), a resampling. Written from openaimodel.py of
CompVis/stable-diffusion. Every shape is diffusers' own. Exports write these names, and foreign checkpoints bring them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase_sd.common.errors import UserError

BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Map diffusers' names of a UNet's modules to LDM's. Raises UserError for blocks that LDM does not have."""
    kinds = [*config["down_block_types"], *config["up_block_types"]]
    foreign = [kind for kind in kinds if kind not in BLOCKS]
    if foreign:
        raise UserError(f"a UNet with a {foreign[0]} has no LDM layout: use --to pipeline")
    levels = len(config["down_block_types"])
    layers = config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    names = dict(UNET_ENDS)
    number = 1  # 0 is conv_in
    for level in range(levels):
        for layer in range(layers[level]):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers[-1 - level] + 1):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if kind == "CrossAttnUpBlock2D" else 1  # in the last block of its level, behind what is there
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return names


def unet_name(name: str, modules: dict[str, str]) -> str:
    """Return LDM's name of one tensor. Raises UserError for one that LDM does not have."""
    module, rest = split(name, modules, "UNet")
    if ".resnets." in module:
        part, _, kind = rest.rpartition(".")
        rest = f"{UNET_RESNET[part]}.{kind}"
    return f"{modules[module]}.{rest}"


def split(name: str, modules: dict[str, str], network: str) -> tuple[str, str]:
    """Return the module of a tensor and the rest of its name. Raises UserError for one that LDM does not have."""
    words = name.split(".")
    for count in range(len(words) - 1, 0, -1):
        module = ".".join(words[:count])
        if module in modules:
            return module, ".".join(words[count:])
    raise UserError(f"the {network}'s {name} has no place in the LDM layout: use --to pipeline")
