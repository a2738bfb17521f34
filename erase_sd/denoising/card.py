"""The model card of an erased model: what was done, how well it worked, how to use it and where it fails."""

from __future__ import annotations

import html
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.files import write_atomic
from erase_sd.denoising.license import HUB_ID
from erase_sd.models.families import family, network
from erase_sd.models.guidance import FILE
from prompts import sensitive

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from huggingface_hub import ModelCardData

LISTED = 8  # captions that the card shows
UNKNOWN_LICENSE = ": it was not found on the machine that made this, look where that model comes from"
TEMPLATE = """---
{{ card_data }}
---

# {{ concepts }} erased from {{ model }}

This network was made to forget **{{ concepts }}**. It replaces that of `{{ model }}`; text encoder, VAE and tokenizer
are the base model's own.

{{ finding }}

## What was erased

{% if understood %}What these captions mean was to be forgotten; beside each stands what may be shown instead.

| forgotten | instead |
|---|---|
{% for caption, anchor in understood %}| {{ caption }} | {{ anchor }} |
{% endfor %}{% if more %}
and {{ more }} more captions of the same kind.
{% endif %}{% endif %}
{% if shown %}`before_after.png` of the run shows these prompts, from the same noise before and after:

{% for prompt in shown %}* {{ prompt }}
{% endfor %}{% endif %}
## How it was made

Method `{{ method }}`, preset `{{ preset }}`.

| knob | value |
|---|---|
{% for name, value in knobs %}| {{ name }} | {{ value }} |
{% endfor %}
The command; on a CPU the same seed gives the same weights again, on a GPU nearly the same:

<pre><code>{{ command }}</code></pre>

## Scores

{% if scores %}| | before | after | pictures |
|---|---|---|---|
{% for name, before, after, n in scores %}| {{ name }} | {{ before }} | {{ after }} | {{ n }} |
{% endfor %}
Rates in percent of all images, with their 95 % intervals; for the erased concept lower is better, for what is
retained higher is better. Protocol: {{ protocol }}.
{% else %}Not measured. These commands measure it; judge before relying on this model:

<pre><code>{{ measuring }}</code></pre>
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
  erased wherever this model is used.
* **Licence**: the base model's licence{{ license }} and its use restrictions still hold{{ unknown_license }}.
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells of one run. Everything a user typed is escaped when it is written: cards render as HTML."""

    model: str  # the base as the user named it: "pocket", a Hub id or a folder, of which the last name is shown
    concepts: list[str]
    method: str
    preset: str
    knobs: dict[str, object]
    command: str
    snippet: str  # from `swap_in_snippet`
    license: dict[str, str]  # from `license_of`
    measuring: str  # from `measuring_commands`
    scores: dict | None = None  # the content of scores.json
    understood: list[tuple[str, str]] = field(default_factory=list)  # different captions, each with its anchor
    shown: list[str] = field(default_factory=list)  # prompts of before_after.png


def write_card(folder: str | Path, facts: CardFacts) -> None:
    """Write folder/README.md, a Hugging Face model card."""
    from huggingface_hub import ModelCard

    named = inert(", ".join(facts.concepts))
    options = [(inert(name), inert(portable(value))) for name, value in facts.knobs.items()]
    pairs = [(inert(caption), inert(anchor)) for caption, anchor in facts.understood[:LISTED]]
    license_name = facts.license.get("license_name", facts.license["license"])
    known = facts.license["license"] != "other"
    card = ModelCard.from_template(
        _metadata(facts.model, facts.license),
        template_str=TEMPLATE,
        concepts=named,
        model=inert(portable(facts.model)),
        finding=finding(named, facts.scores),
        measuring=html.escape(facts.measuring, quote=False),
        license=f" ({inert(license_name)})" if known else "",
        unknown_license="" if known else UNKNOWN_LICENSE,
        method=inert(facts.method),
        preset=inert(facts.preset),
        knobs=options,
        command=html.escape(" ".join(facts.command.split()), quote=False),
        snippet=facts.snippet,
        scores=_score_rows(facts.scores),
        protocol=_protocol(facts.scores),
        understood=pairs,
        more=max(0, len(facts.understood) - LISTED),
        shown=list(map(inert, facts.shown)),
        unvalidated=facts.model != "pocket",
    )
    write_atomic(Path(folder) / "README.md", f"{card}\n")


def _score_rows(scores: dict | None) -> list[tuple[str, str, str, object]]:
    """Return (name, before, after, pictures) of each rate, in percent with its interval where there is one."""
    rows = []
    for name, before, after in rates(scores):
        group, _, kind = name.partition(" ")
        interval = scores.get("ci95", {}).get(group, {})
        interval = interval.get(kind, {}) if kind else interval
        n = scores.get("n", {}).get("retain" if group == "retain" else "forget", "")
        rows.append((inert(name), _percent(before, interval.get("before")), _percent(after, interval.get("after")), n))
    return rows


def _percent(rate: float, interval: list[float] | None) -> str:
    """Return "1.2 (0.0 to 3.0)" for a rate in [0, 1] and its interval."""
    if interval is None:
        return f"{100 * rate:.1f}"
    return f"{100 * rate:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _protocol(scores: dict | None) -> str:
    """Return in one line by which rules the scores were counted."""
    protocol = (scores or {}).get("protocol", {})
    if not isinstance(protocol, dict):
        return inert(protocol)
    parts = []
    for name, value in protocol.items():
        if isinstance(value, list):  # the concepts, each a kind and a word
            value = ", ".join(" ".join(part) for part in value)
        parts.append(f"{name.replace('_', ' ')} {value}")
    return inert("; ".join(parts))


def finding(concepts: str, scores: dict | None) -> str:
    """Return in one sentence what scores.json says of the concepts and of the rest, or that nobody measured it."""
    concept, kept = (scores or {}).get("concept"), (scores or {}).get("retain")
    if not concept:
        return f"Whether it still draws {concepts} was **not measured**."
    each = scores.get("concepts") or {concepts: concept | {"n": scores["n"]["forget"]}}
    parts = []
    for name, rate in each.items():  # each has its own: none that is still drawn is averaged away
        shown = f"{100 * rate['before']:.1f} % before and in {100 * rate['after']:.1f} % after"
        parts.append(f"sked for {name}, a judge found it in {shown}, of {rate['n']} pictures")
    text = f"A{'; a'.join(parts)}"
    if not kept:
        return f"{text}; what became of the rest was **not measured**."
    before, after = (sum(both[when] for both in kept.values()) / len(kept) for when in ("before", "after"))
    return f"{text}; what else was asked for is right in {100 * before:.1f} % before and in {100 * after:.1f} % after."


def measuring_commands(concepts: list[str], model: str, part: str, folder: str) -> str:
    """Return the command lines that draw pictures without and with the `part` in `folder`, and judge both."""
    draw = ["python", "-m", "eval.generate", "--model", model]
    compare = ["gen/erased", "--baseline", "gen/base"]
    if model == "pocket":
        draw += ["--prompts", "pocket", "--steps", "20", "--guidance", "3.5"]
        judge = ["python", "-m", "eval.concepts", *compare, "--concept", *concepts]
    elif any(map(sensitive, concepts)):
        draw += ["--prompts", "i2p", "--category", "sexual"]
        judge = ["python", "-m", "eval.nudity", "gen/base", *compare]
    else:  # no judge knows every concept: the eyes do
        draw += ["--prompts", concepts[0], "--images_per_prompt", "10"]
        judge = ["python", "-m", "eval.grid", "--folders", "gen/base", "gen/erased"]
    lines = [
        [*draw, "--output_dir", "gen/base"],
        [*draw, f"--{part}", folder, "--output_dir", "gen/erased"],
        judge,
    ]
    return "\n".join(map(shlex.join, lines))


def portable(value: object) -> object:
    """Return a value without a path of this machine: below the working directory from there on, else its last name."""
    if isinstance(value, list | tuple):
        return [portable(one) for one in value]
    if not isinstance(value, str | Path) or not Path(value).is_absolute():
        return value
    path, here = Path(value), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else path.name


def _metadata(model: str, license: dict[str, str]) -> ModelCardData:
    """Return the card's front matter; only a Hub id can be a base model there."""
    from huggingface_hub import ModelCardData

    on_hub = model != "pocket" and not Path(model).exists() and re.fullmatch(HUB_ID, model)
    return ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion", "concept-erasure", "machine-unlearning"],
        **license,
    )


def swap_in_snippet(
    pipe: DiffusionPipeline,
    model: str,
    folder: str | Path,
    config: str | None = None,
    dtype: str = "torch.float32",
    shown: str | None = None,
) -> str:
    """Return Python that loads the base `model` and swaps in what is saved in `folder`. Both must have the same dtype.

    `config` is the layout of a model that is a single file; `shown` is how the folder is called in that code.
    """
    part, kind = family(pipe).part, type(network(pipe)).__name__
    source, saved, imports = repr(str(model)), shown or str(folder), ""
    if model == "pocket":
        source, imports = "str(FOLDER)", "from erase_sd.pocket import FOLDER\n"
    if (Path(folder) / FILE).is_file():  # guidance, of which diffusers knows nothing
        layout = f", config={config!r}" if config else ""
        given = f"{source}, {part}={saved!r}{layout}, dtype={dtype}"
        return f"import torch\nfrom erase_sd.models.pipeline import load\n{imports}\npipe = load({given})"
    loader = f"from_single_file({source}, config={config!r}" if config else f"from_pretrained({source}"
    for name, component in pipe.components.items():
        if component is None and name not in pipe._optional_components:
            loader += f", {name}=None"  # Stable Diffusion 3 without T5 does not load otherwise
    encoder = ""
    if (Path(folder) / "text_encoder").is_dir():
        kind_of_encoder = type(pipe.text_encoder).__name__
        imports = f"from transformers import {kind_of_encoder}\n{imports}"
        given = f'{saved!r}, subfolder="text_encoder", dtype={dtype}'
        encoder = f"\npipe.text_encoder = {kind_of_encoder}.from_pretrained({given})"
    return (
        "import torch\n"
        f"from diffusers import {', '.join(sorted([type(pipe).__name__, kind]))}\n"
        f"{imports}\n"
        f"pipe = {type(pipe).__name__}.{loader}, dtype={dtype})\n"
        f'pipe.{part} = {kind}.from_pretrained({saved!r}, subfolder="{part}", dtype={dtype}){encoder}'
    )


def inert(text: object) -> str:
    """Return `text` as Markdown that shows it and nothing else: no HTML, link, emphasis, code, table or line break."""
    return re.sub(r"[<>&`|\[\]*\\\r\n]", lambda match: f"&#{ord(match[0])};", str(text))


def rates(scores: dict | None, name: str = "") -> list[tuple[str, float, float]]:
    """Return (name, before, after) of each pair of rates in scores.json, however deep: "retain object", 0.97, 0.96."""
    found: list[tuple[str, float, float]] = []
    if not isinstance(scores, dict):
        return found
    if {"before", "after"} <= scores.keys():
        before, after = scores["before"], scores["after"]
        if isinstance(before, int | float) and isinstance(after, int | float):  # intervals are no rates
            found.append((name, before, after))
        return found
    for key, value in scores.items():
        found += rates(value, f"{name} {key}".strip())
    return found
