"""One .safetensors file in the LDM layout, for ComfyUI and A1111: UNet, VAE and text encoders of SD 1, 2 and XL.

Read back by diffusers before it takes its place: what does not come out bit for bit as it went in is not written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.exports.base import DTYPES, Erased, ExportSettings, cast, new_file
from erase_sd.exports.ldm import checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Width of the text that the UNet reads -> the architecture's name in ModelSpec, Stability AI's metadata standard.
ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2",
    2048: "stable-diffusion-xl-v1-base",
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def write_single_file(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Write the file `output` in one type. Raises UserError for a model that has no such layout."""
    dtype = DTYPES[settings.dtype[0]]
    tensors = cast(checkpoint(erased.pipe), dtype, "tensor")
    with new_file(output) as temporary:
        save_file(tensors, temporary, erased.metadata() | model_spec(erased))
        del tensors
        verify(temporary, erased.pipe, dtype)
    kind = type(erased.pipe).__name__
    lines = [f"{output}: a checkpoint in the LDM layout, read back by diffusers tensor by tensor"]
    if erased.pipe.unet.config.cross_attention_dim not in ARCHITECTURES:
        lines.append("ComfyUI and A1111 know the widths of Stable Diffusion 1, 2 and XL only; this model has others")
    return [*lines, "", f"pipe = {kind}.from_single_file({str(output)!r}, config=BASE)"]


def model_spec(erased: Erased) -> dict[str, str]:
    """Return the metadata by which user interfaces show a model: ModelSpec 1.0.0."""
    pipe = erased.pipe
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    values = {
        "sai_model_spec": "1.0.0",
        "title": erased.name + " erased",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "prediction_type": PREDICTIONS.get(pipe.scheduler.config.get("prediction_type"), "epsilon"),
        "resolution": f"{side}x{side}",
    }
    if architecture := ARCHITECTURES.get(pipe.unet.config.cross_attention_dim):
        values["architecture"] = architecture
    return {f"modelspec.{name}": value for name, value in values.items()}


def verify(path: Path, pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Read a file back as diffusers does, without the network, and compare every tensor.

    Raises UserError, naming the tensor, if one is missing or differs from the pipeline's in a bit.
    """
    with tempfile.TemporaryDirectory() as layout:
        write_layout(pipe, Path(layout))
        left_out = {name: None for name, component in pipe.components.items() if component is None}
        read = type(pipe).from_single_file(str(path), config=layout, local_files_only=True, dtype=dtype, **left_out)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            _compare(part, module.state_dict(), getattr(read, part).state_dict(), dtype)


def write_layout(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline without its weights: what `from_single_file(config=)` reads."""
    pipe.save_config(str(folder))
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            writer = component if hasattr(component, "save_config") else component.config
            save = writer.save_config if hasattr(writer, "save_config") else writer.save_pretrained
            save(str(folder / name))
        elif component is not None:
            component.save_pretrained(str(folder / name))


def _compare(part: str, written: dict[str, Tensor], read: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, x in written.items():
        back = read.get(name)
        if back is None or back.is_meta or not torch.equal(back, x.to(dtype)):
            raise UserError(f"{part} {name} does not survive the LDM layout of this model: use --to pipeline")
