"""Which small, genuine model can be erased from in milliseconds, and who judges the result?

world        what the model can draw and the sentences that ask for it
prompt_sets  prompts to forget, to retain and to evaluate with
oracle       the judge: a small CNN that names what an image shows
score        rates before and after, by the oracle
training     how model and oracle were made: python -m erase_sd.pocket.training
model        the pipeline itself, trained on real artwork; ATTRIBUTION.md names its artists
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
