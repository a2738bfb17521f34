"""Write a network so that diffusers loads it: whole or not at all, finite, without private paths."""

import json
from pathlib import Path

import torch
from diffusers import ModelMixin

from erase_sd.runtime import new_folder


def save_network(network: ModelMixin, folder: str | Path, part: str, dtype: torch.dtype | None = None) -> Path:
    """Write `network` to folder/part, whole or not at all, for `from_pretrained(folder, subfolder=part)`.

    `dtype` is that of the file, by default the model's own. Raises FloatingPointError, with nothing written, if a
    weight is not finite in that dtype. `network` itself is not changed.
    """
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in network.state_dict().items()}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{part} weight {name} has NaN or infinite values: nothing was saved")
    target = Path(folder) / part
    with torch.device("meta"):
        blank = type(network).from_config(network.config)
    blank.load_state_dict(weights, assign=True)
    with new_folder(target) as temporary:
        blank.save_pretrained(str(temporary))
        _scrub(Path(temporary) / blank.config_name)
    return target


def _scrub(config: Path) -> None:
    """Drop the path the model was loaded from: it names the user's own folders."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
