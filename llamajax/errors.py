"""The error that a user can fix. Every verb turns it into one message and exit code 2."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's: names the offending value, the constraint and the fix.

    The message is printed as it is, without a traceback. Never raise it for a bug of ours.
    """


def combine(problems: Sequence[str], *, title: str) -> UserError:
    """One error that lists every problem found, so that a user fixes them all in one go."""
    return UserError("\n".join([title, *(f"  - {p}" for p in problems)]))


def run_verb(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a verb on the command line's arguments and exit: its own code, or 2 for a UserError."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code or 0)
