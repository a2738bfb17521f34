"""The one error that only the user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake only the user can correct; its text is one sentence that names the value and the next step."""


@contextmanager
def asked_by_the_user() -> Iterator[None]:
    """Turn a ValueError of the block into a UserError: `prompts` writes for the user, but stands alone."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


class LostModel(UserError):
    """A run that lost its model: its options were too strong, which a search counts as the worst of results."""
