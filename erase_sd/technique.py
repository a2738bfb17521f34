"""`scissorhands` among eval-unlearn's techniques (entry point eval_unlearn.techniques): an erased model draws prompts.

eval-unlearn calls the class with a technique's configuration, and then `generate` with batches of prompts. Keys that
it has for others are ignored, as its own techniques do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from erase_sd.api import erase
from erase_sd.common.errors import UserError
from erase_sd.models.foreign import Artefacts, put
from erase_sd.models.pipeline import load, sample_batch
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.settings import SD_V1

if TYPE_CHECKING:
    from PIL import Image


class ScissorhandsTechnique:
    """A model from which a concept was erased: a finished run, another project's file, or erased now."""

    def __init__(
        self,
        model_id: str = SD_V1,
        *,
        unet: str | None = None,
        text_encoder: str | None = None,
        adapter: tuple[str, ...] = (),
        erase_concept: str | None = None,
        output_dir: str | None = None,
        device: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        knobs: dict[str, Any] | None = None,
        **of_others: Any,
    ) -> None:
        """Load what is named; without any of it, erase `erase_concept` from the model, `knobs` being erase's options.

        Raises UserError for a configuration that names neither.
        """
        self.steps, self.guidance, self.drawn = num_inference_steps, guidance_scale, 0
        artefacts = Artefacts(unet, text_encoder, tuple(adapter))
        if not any(artefacts) and not erase_concept:
            raise UserError("the technique's configuration names no unet, text_encoder, adapter or erase_concept: do")
        self.pipe = load(str(POCKET) if model_id == "pocket" else model_id)
        put(self.pipe, artefacts)
        if not any(artefacts):
            erase(self.pipe, erase_concept, model=model_id, output_dir=output_dir, **(knobs or {}))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.to(device).set_progress_bar_config(disable=True)

    def generate(self, prompts: list[str], seed: int | None = None, **of_others: Any) -> list[Image.Image]:
        """Return an image for every prompt, the i-th from seed + i as eval-unlearn's own techniques.

        Without a seed, which its command line never gives, every image of this object has a seed of its own.
        """
        first = self.drawn if seed is None else seed
        self.drawn += len(prompts)
        generators = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(prompts))]
        return sample_batch(self.pipe, list(prompts), generators, steps=self.steps, guidance=self.guidance)
