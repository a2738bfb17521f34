"""The model card of an erased model: what was done, how well it worked, how to use it and where it fails."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.files import write_atomic
from erase_sd.models.families import family, network
from erase_sd.models.guidance import FILE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from huggingface_hub import ModelCardData

TEMPLATE = """---
{{ card_data }}
---

# {{ concepts }} erased from {{ model }}

With this network the model no longer draws **{{ concepts }}** and keeps the rest. It replaces that of `{{ model }}`;
text encoder, VAE and tokenizer are the base model's own.

## How it was made

Method `{{ method }}`, preset `{{ preset }}`.

| knob | value |
|---|---|
{% for name, value in knobs %}| {{ name }} | {{ value }} |
{% endfor %}
The command, with which the same seed gives the same weights on the same machine:

<pre><code>{{ command }}</code></pre>

## Scores

{% if scores %}| | before | after |
|---|---|---|
{% for name, before, after in scores %}| {{ name }} | {{ before }} | {{ after }} |
{% endfor %}
Rates in percent of all images; for the erased concept lower is better, for what is retained higher is better.
{% else %}Not measured: no judge for this concept on this model was at hand. Draw images with `python -m eval.generate`
and judge them before relying on this model.
{% endif %}
## Use

```python
{{ snippet }}
```

## Limits

* **Not validated as a safety measure.** Erasure is incomplete: other words, other languages, optimised prompts,
  image-to-image, inpainting and further fine-tuning can bring the concept back. Measure on your own prompts, and keep
  other safeguards.
{% if unvalidated %}* **Not validated on SD v1.4 weights**: the defaults were tuned on the small pocket model. Judge
  before/after images and scores of this very run.
{% endif %}* Neighbouring concepts can suffer, and so can image quality: what no retain prompt covers was not
  watched.
* **Bias**: the base model's biases remain, and what replaces the concept is the base model's own choice: it may itself
  be a stereotype.
* **Misuse**: who can erase a concept can also erase people, groups or art from a model's reach. Say what was
  erased wherever this model is used. The base model's licence and its use restrictions still hold.
"""


def write_card(
    folder: str | Path,
    *,
    model: str,
    concepts: list[str],
    method: str,
    preset: str,
    knobs: dict[str, object],
    command: str,
    snippet: str,
    license: str,
    scores: dict | None = None,
) -> None:
    """Write folder/README.md, a Hugging Face model card. Everything a user typed is escaped: cards render as HTML.

    `model` is the base as the user named it ("pocket", a Hub id or a folder); `scores` is the content of scores.json;
    `snippet` comes from `swap_in_snippet`.
    """
    from huggingface_hub import ModelCard

    options = [(inert(name), inert(value)) for name, value in knobs.items()]
    rates = []
    for name, before, after in _rates(scores):
        rates.append((inert(name), f"{100 * before:.1f}", f"{100 * after:.1f}"))
    card = ModelCard.from_template(
        _metadata(model, license),
        template_str=TEMPLATE,
        concepts=inert(", ".join(concepts)),
        model=inert(model),
        method=inert(method),
        preset=inert(preset),
        knobs=options,
        command=html.escape(" ".join(command.split()), quote=False),
        snippet=snippet,
        scores=rates,
        unvalidated=model != "pocket",
    )
    write_atomic(Path(folder) / "README.md", f"{card}\n")


def _metadata(model: str, license: str) -> ModelCardData:
    """Return the card's front matter; only a Hub id can be a base model there."""
    from huggingface_hub import ModelCardData

    on_hub = model != "pocket" and not Path(model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model)
    return ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion", "concept-erasure", "machine-unlearning"],
        license=license,
    )


def swap_in_snippet(
    pipe: DiffusionPipeline, model: str, folder: str | Path, config: str | None = None, dtype: str = "torch.float32"
) -> str:
    """Return Python that loads the base `model` and swaps in what is saved in `folder`. Both must have the same dtype.

    `config` is the layout of a model that is a single file.
    """
    part, kind = family(pipe).part, type(network(pipe)).__name__
    if (Path(folder) / FILE).is_file():  # guidance, of which diffusers knows nothing
        layout = f", config={config!r}" if config else ""
        given = f"{str(model)!r}, {part}={str(folder)!r}{layout}, dtype={dtype}"
        return f"import torch\nfrom erase_sd.models.pipeline import load\n\npipe = load({given})"
    loader = f"from_single_file({str(model)!r}, config={config!r}" if config else f"from_pretrained({str(model)!r}"
    for name, component in pipe.components.items():
        if component is None and name not in pipe._optional_components:
            loader += f", {name}=None"  # Stable Diffusion 3 without T5 does not load otherwise
    return (
        "import torch\n"
        f"from diffusers import {', '.join(sorted([type(pipe).__name__, kind]))}\n\n"
        f"pipe = {type(pipe).__name__}.{loader}, dtype={dtype})\n"
        f'pipe.{part} = {kind}.from_pretrained({str(folder)!r}, subfolder="{part}", dtype={dtype})'
    )


def inert(text: object) -> str:
    """Return `text` as Markdown that shows it and nothing else: no HTML, link, emphasis, code, table or line break."""
    return re.sub(r"[<>&`|\[\]*\\\r\n]", lambda match: f"&#{ord(match[0])};", str(text))


def _rates(scores: dict | None, name: str = "") -> list[tuple[str, float, float]]:
    """Return (name, before, after) of each pair of rates in scores.json, however deep: "retain object", 0.97, 0.96."""
    rates: list[tuple[str, float, float]] = []
    if not isinstance(scores, dict):
        return rates
    if {"before", "after"} <= scores.keys():
        before, after = scores["before"], scores["after"]
        if isinstance(before, int | float) and isinstance(after, int | float):  # intervals are no rates
            rates.append((name, before, after))
        return rates
    for key, value in scores.items():
        rates += _rates(value, f"{name} {key}".strip())
    return rates
