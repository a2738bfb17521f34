"""A file of torch.save for tools that take nothing else. Reading such a file can run code: only on request.

out.pt      the UNet's state dict by diffusers' names, which is loaded strictly: UnlearnDiffAtk's
            --task.target_ckpt
out.ckpt    {"state_dict": the whole model in the LDM layout}: UnlearnCanvas' CompVis scripts
"""

from __future__ import annotations

from pathlib import Path

import torch

from erase_sd.common.errors import UserError
from erase_sd.exports.base import Erased, ExportSettings, cast, new_file
from erase_sd.exports.ldm import checkpoint

READ_AS_TEXT_ENCODER = ("text_encoder", "TextEncoder")  # UnlearnDiffAtk decides by the path what a file is


def write_pt(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Write `output`, float32 on the CPU. Raises UserError for a path that UnlearnDiffAtk would misread."""
    check_path(output, settings)
    if output.suffix == ".pt":
        content = cast(erased.network.state_dict(), torch.float32, erased.part)
        use = f"unet.load_state_dict(torch.load({str(output)!r}, weights_only=True))"
    else:
        content = {"state_dict": cast(checkpoint(erased.pipe), torch.float32, "tensor")}
        use = f'model.load_state_dict(torch.load({str(output)!r}, weights_only=True)["state_dict"], strict=False)'
    with new_file(output) as temporary:
        torch.save(content, temporary)
    return [f"{output}: pickled tensors, to be read with weights_only=True", "", use]


def check_path(output: Path, settings: ExportSettings) -> None:
    """Raise UserError for a path that UnlearnDiffAtk would misread."""
    for word in READ_AS_TEXT_ENCODER:
        if word in str(output.resolve()):
            raise UserError(f"--output {output}: UnlearnDiffAtk reads a path with {word} as a text encoder: rename it")
