"""Errors that are no bugs, and how they are shown."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_FOR_RANK_0 = 10.0


class UserError(Exception):
    """A mistake in a file, a setting or a command; its text names the mistake and what to do.

    Attributes:
        code: the exit code; 1 for what may be well at the next start.
    """

    code = 2


class GiveUpError(Exception):
    """A training failed in a way that the same command would repeat; its text says how."""


def exit_code(error: BaseException) -> int:
    """Give the exit code of a process that an error ends: 2 for a mistake of the user, else 1."""
    return error.code if isinstance(error, UserError) else 1


@contextmanager
def shown_to_user() -> Iterator[None]:
    """Turn an error that is no bug into one message and its exit code."""
    try:
        yield
    except (UserError, GiveUpError) as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 says it, if it can: a launcher ends all ranks with the first that fails, so
            # nobody may be quicker. Who is still there after that is the only one to know.
            time.sleep(SECONDS_FOR_RANK_0)
        sys.stderr.write(f"dtrain: {error}\n")
        sys.exit(exit_code(error))
