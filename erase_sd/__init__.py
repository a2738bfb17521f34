"""Erase concepts from Stable Diffusion: Scissorhands (Wu & Harandi, ECCV 2024, arXiv 2401.06187) and its neighbours.

    from erase_sd import erase
    record = erase(pipe, "cat", method="scissorhands")

Importing the package loads neither torch nor diffusers; the first use of `erase` does.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "erase":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("erase_sd.api").erase
