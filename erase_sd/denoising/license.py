"""The licence of a base model: its own card's, wherever that card is on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from erase_sd.settings import SD_V1

HUB_ID = r"[\w.-]+/[\w.-]+"
FIELDS = ("license", "license_name", "license_link")
KNOWN = {  # where no card is needed to know
    "pocket": {"license": "cc-by-4.0"},  # the most demanding of the artwork's licences
    SD_V1: {"license": "creativeml-openrail-m"},
}


def license_of(model: str) -> dict[str, str]:
    """Return the licence as a card's front matter has it; "other" with a link, where there is one, if unknown."""
    if model in KNOWN:
        return KNOWN[model]
    card = _card(model)
    found = _front_matter(card) if card else {}
    if isinstance(found.get("license"), str):
        return {name: found[name] for name in FIELDS if isinstance(found.get(name), str)}
    origin = hub_id(model)
    if origin in KNOWN:
        return KNOWN[origin]
    link = {"license_link": f"https://huggingface.co/{origin}"} if origin else {}
    return {"license": "other", "license_name": "that-of-the-base-model"} | link


def hub_id(model: str) -> str | None:
    """Return where on the Hub a model comes from: a folder says so in its model_index.json, or nowhere."""
    path = Path(model)
    if path.is_dir():
        try:
            model = str(json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_name_or_path"))
        except (OSError, ValueError, AttributeError):
            return None
    elif path.exists():
        return None
    return model if re.fullmatch(HUB_ID, model) else None


def _card(model: str) -> Path | None:
    """Return the model card in a folder or in the Hub's cache, None without one; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        card = Path(model) / "README.md"
        return card if card.is_file() else None
    if not hub_id(model):
        return None
    cached = try_to_load_from_cache(model, "README.md")
    return Path(cached) if isinstance(cached, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """Return what a card says of itself; nothing where that cannot be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
