"""What other projects publish in the place of a model, put into a pipeline of the base it was made from.

files          bytes -> named tensors: .safetensors, .pt, .pth, .ckpt, .bin; nothing in them is executed
networks       a UNet, whole or a part (ESD, UCE), by diffusers' names or LDM's, the EMA copy apart
adapters       LoRA and SPM, by the names of peft, diffusers and kohya, added to the weights
text_encoders  CLIP text encoders (AdvUnlearn, HiRM), whole or a part
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from erase_sd.common.files import digest, file_digest
from erase_sd.models.checks import check_weights
from erase_sd.models.foreign.adapters import add_adapter
from erase_sd.models.foreign.files import Applied, located, weights_of
from erase_sd.models.foreign.networks import is_single_file, put_network
from erase_sd.models.foreign.text_encoders import put_text_encoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["READERS", "Applied", "Artefacts", "identity", "is_single_file", "put"]

READERS: dict[str, Callable[[DiffusionPipeline, str], Applied]] = {  # by the option that names its source
    "unet": put_network,
    "text_encoder": put_text_encoder,
    "adapter": add_adapter,
}


class Artefacts(NamedTuple):
    """What is put into a base model, as the user named it: adapters last, in this order."""

    unet: str | None = None
    text_encoder: str | None = None
    adapter: tuple[str, ...] = ()

    def sources(self) -> list[tuple[str, str]]:
        """Return (option, source) of everything, in the order in which it is put in."""
        given = []
        for option, source in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            if source:
                given.append((option, source))
        for source in self.adapter:
            given.append(("adapter", source))
        return given


def put(pipe: DiffusionPipeline, artefacts: Artefacts) -> list[Applied]:
    """Put everything into the pipeline, in place, and return what each was.

    Raises UserError for a source that is missing, unreadable, of another kind, not finite, or that does not fit.
    """
    done = []
    for option, source in artefacts.sources():
        applied = READERS[option](pipe, source)
        for part in sorted(applied.parts):
            check_weights(getattr(pipe, part), part, source)
        done.append(applied)
    return done


def identity(artefacts: Artefacts) -> dict[str, str]:
    """Return {option_sha256: hash} of the local files, without loading them; {} for nothing.

    Raises UserError for a source that is missing.
    """
    hashes: dict[str, list[list[str]]] = {}
    for option, source in artefacts.sources():
        if option == "unet" and not is_single_file(source):
            continue  # diffusers' own loaders know whether it is there
        path, tail = located(source, f"--{option}")
        if option == "text_encoder" and (path / "text_encoder").is_dir():
            path = path / "text_encoder"
        found = hashes.setdefault(option, [])
        for file in weights_of(path, f"--{option}"):
            found.append([tail, file_digest(file)])
        config = (path if path.is_dir() else path.parent) / "adapter_config.json"
        if option == "adapter" and config.is_file():
            found.append(["config", file_digest(config)])
    return {f"{option}_sha256": digest(found) for option, found in hashes.items()}
