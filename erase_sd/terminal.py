"""The terminal belongs to our own progress bars and sentences: a user's mistake is one line on stderr."""

import os
import warnings


def quiet() -> None:
    """Silence what the libraries say while they load; call it before anything imports them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it prints every prompt that is longer than 77 tokens
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # what diffusers passes to the Hub

    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
