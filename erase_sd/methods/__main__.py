"""Bring the table of docs/methods.md up to date: `python -m erase_sd.methods`, from the root of a clone."""

from pathlib import Path

from erase_sd.common.files import replace_between
from erase_sd.methods import table

if __name__ == "__main__":
    replace_between(Path("docs/methods.md"), "methods", table() + "\n")
