"""The error that a user can fix. Every verb turns it into one message and exit code 2."""


class UserError(ValueError):
    """A mistake of the user's: names the offending value, the constraint and the fix.

    The message is printed as it is, without a traceback. Never raise it for a bug of ours.
    """


def combine(problems: list[str], *, title: str) -> UserError:
    """One error that lists every problem found, so that a user fixes them all in one go."""
    lines = "\n".join(f"  - {p}" for p in problems)
    return UserError(f"{title}\n{lines}")
