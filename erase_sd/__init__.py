"""Erase concepts from Stable Diffusion: Scissorhands (Wu & Harandi, ECCV 2024, arXiv 2401.06187) and its neighbours.

    from erase_sd import erase
    record = erase(pipe, "cat", method="scissorhands")

Importing the package loads neither torch nor diffusers; the first use of `erase` does.
"""

import sys
from collections.abc import Callable
from types import ModuleType


class _Package(ModuleType):
    """`erase_sd.api` is the verb, whether or not its namesake module `erase_sd/erase.py` was imported before."""

    @property
    def erase(self) -> Callable:
        from erase_sd.api import erase

        return erase

    @erase.setter
    def erase(self, module: ModuleType) -> None:
        """Ignore the import system, which would put the module over the function."""


sys.modules[__name__].__class__ = _Package
