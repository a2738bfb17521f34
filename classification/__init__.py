"""Unlearning on image classifiers, with the core and the general methods of erase_sd. Nothing here yet."""
