"""Which methods are there? One file each, with its options, formula and presets, and one line in REGISTRY.

base.py  what a method declares, methods of one loss, pieces of presets; the other files are a method each
"""

from __future__ import annotations

import re
from importlib import import_module

from erase_sd.methods.base import Method

REGISTRY = {  # the word behind --method: module and class. A new method is its file and a line here.
    "scissorhands": "scissorhands.Scissorhands",
    "salun": "salun.SalUn",
    "ascent": "ascent.GradientAscent",
    "finetune": "finetune.FineTune",
    "esd": "esd.ESD",
    "uce": "uce.UCE",
    "concept-ablation": "concept_ablation.ConceptAblation",
    "erasediff": "erasediff.EraseDiff",
    "selective-amnesia": "selective_amnesia.SelectiveAmnesia",
    "forget-me-not": "forget_me_not.ForgetMeNot",
    "sld": "sld.SLD",
}
METHODS: dict[str, type[Method]] = {}
PRESETS: dict[str, dict[str, dict]] = {}
TITLES: dict[str, str] = {}
SENTENCES: dict[str, str] = {}
for _word, _place in REGISTRY.items():
    _name, _cls = _place.split(".")
    _module = import_module(f"{__name__}.{_name}")
    METHODS[_word] = getattr(_module, _cls)
    PRESETS[_word] = _module.PRESETS
    TITLES[_word], _, SENTENCES[_word] = _module.__doc__.partition("\n")[0].partition(": ")

SOURCE = re.compile(r"[^,]+, (?P<authors>.+?), (?P<venue>[^,]+ \d{4}), arXiv (?P<arxiv>\d{4}\.\d{4,5}): ")


def table() -> str:
    """Return the methods as a Markdown table for the documentation: title, source and one sentence of each.

    A method's module begins with "Title: sentence.", its class with "Name, authors, venue year, arXiv id: ...". Raises
    ValueError for a class that does not.
    """
    lines = ["| `--method` | method | source | what it does |", "|---|---|---|---|"]
    for word, cls in METHODS.items():
        found = SOURCE.match(cls.__doc__)
        if found is None:
            raise ValueError(f"{cls.__name__} does not begin with its name, authors, venue, year and arXiv id")
        link = f"[{found['arxiv']}](https://arxiv.org/abs/{found['arxiv']})"
        source = f"{found['authors']}, {found['venue']}, {link}"
        lines.append(f"| `{word}` | {TITLES[word]} | {source} | {SENTENCES[word].rstrip('.')} |")
    return "\n".join(lines)
