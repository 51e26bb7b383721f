"""Mistakes that a user can put right, and how they are shown."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_FOR_RANK_0 = 10.0


class UserError(Exception):
    """A mistake in a file, a setting or a command; its text names the mistake and what to do."""


@contextmanager
def shown_to_user() -> Iterator[None]:
    """Turn a UserError into one message and exit code 2."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 says it, if it can: a launcher ends all ranks with the first that fails, so
            # nobody may be quicker. Who is still there after that is the only one to know.
            time.sleep(SECONDS_FOR_RANK_0)
        sys.stderr.write(f"dtrain: {error}\n")
        sys.exit(2)
