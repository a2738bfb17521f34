"""What to ask a model for: concepts to forget, everyday captions to retain, and readers of published prompt files.

This package stands alone: standard library only, and what is wrong with its input is a ValueError with a sentence for
the user. `prompts.concepts` has the concepts, `prompts.tables` the rows of prompt files.
"""

from prompts.concepts import Concept, Example, called, captions, check_single, load, people, sensitive

__all__ = ["Concept", "Example", "called", "captions", "check_single", "load", "people", "sensitive"]
