"""Mistakes that a user can put right, and how they are shown."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a file, a setting or a command; its text names the mistake and what to do."""


@contextmanager
def shown_to_user() -> Iterator[None]:
    """Turn a UserError into one message, from the first rank only, and exit code 2."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"dtrain: {error}\n")
        sys.exit(2)
