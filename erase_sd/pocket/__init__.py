"""The embedded pocket Stable Diffusion: a genuine pipeline, trained on real artwork, that draws in milliseconds."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
