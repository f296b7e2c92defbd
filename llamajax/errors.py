"""The errors that a user can fix, and the exit codes of all verbs."""

import contextlib
import enum
import sys
from collections.abc import Sequence


class ExitCode(enum.IntEnum):
    """Every exit code of a verb: number, meaning, whether starting the same command again can help.

    75 is EX_TEMPFAIL of sysexits.h, 124 that of timeout(1); 79 and 80 are free in both. A worker
    that a signal ended has 128 + its number, as in a shell.
    """

    def __new__(cls, code: int, meaning: str, restart_helps: bool) -> "ExitCode":
        self = int.__new__(cls, code)
        self._value_ = code
        self.meaning, self.restart_helps = meaning, restart_helps
        return self

    meaning: str
    restart_helps: bool
    FINISHED = 0, "The verb has done what it was asked for.", False
    FAILED = 1, "An internal failure. `doctor`: not ready; `verify_resume`: not proven.", True
    USER_ERROR = 2, "A mistake of the user's. One message says what, where and the fix.", False
    TRANSIENT = (
        75,
        "Something that passes: a busy port, a lock that another process holds, a bucket that "
        "cannot be reached, a node or process that has not come in time.",
        True,
    )
    GUARD_STOP = 79, "A guard stopped `train` (docs/guards.md).", False
    BAD_DEVICE = 80, "The canary of `train` found a device that computes wrongly.", False
    STALLED = 124, "`launch`: no worker made progress within `--timeout_s`.", True
    STOPPED = (
        143,
        "SIGTERM, SIGINT, SIGHUP or SIGUSR2 ended it; `train` saves first, and continues there.",
        True,
    )


def restart_helps(code: int) -> bool:
    """Return whether starting again can help after `code`; True for a code that is not ours."""
    return all(known.restart_helps for known in ExitCode if known == code)


class UserError(ValueError):
    """A mistake of the user's: names the offending value, the constraint and the fix.

    The message is printed as it is, without a traceback. Never raise it for a bug of ours.
    """

    exit_code = ExitCode.USER_ERROR


class TransientError(UserError):
    """Something that passes by itself: the same command may work later, and is started again."""

    exit_code = ExitCode.TRANSIENT


def combine(problems: Sequence[str], *, title: str, listed: int | None = None) -> UserError:
    """Return one error that lists every problem found, so that a user fixes them all in one go.

    listed: how many problems are named, None for all. The rest is counted.
    """
    shown = list(problems[:listed])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return UserError("\n".join([title, *(f"  - {p}" for p in shown)]))


def say(text: str) -> None:
    """Print a line to standard error; never raise, for a broken terminal must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:  # print would take standard output instead
            print(text, file=sys.stderr, flush=True)
