"""Erasing methods: one file each, and the registry. A method is a frozen dataclass of its knobs, called on a task."""

from erase_sd.methods.scissorhands import Scissorhands

METHODS = {"scissorhands": Scissorhands}
