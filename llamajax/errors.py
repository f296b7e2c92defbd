"""Errors that a user can fix, the words that were probably meant, and the verbs' exit codes."""

import contextlib
import difflib
import enum
import sys
from collections.abc import Iterable, Sequence


class ExitCode(enum.IntEnum):
    """All exit codes of the verbs: number, meaning, whether a restart of the command can help.

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
    """Return whether a restart can help after `code`; True for a code that is not ours."""
    return all(known.restart_helps for known in ExitCode if known == code)


class UserError(ValueError):
    """A mistake of the user's; the message names what is wrong, where, and the fix.

    It is printed without a traceback. Never raise it for a bug of ours.
    """

    exit_code = ExitCode.USER_ERROR


class TransientError(UserError):
    """A problem that passes by itself: the same command may work later, and is restarted."""

    exit_code = ExitCode.TRANSIENT


def combine(problems: Sequence[str], *, title: str, listed: int | None = None) -> UserError:
    """Return one error that lists every problem found, so that a user fixes them all in one go.

    listed: how many problems are named, None for all. The rest is counted.
    """
    shown = list(problems[:listed])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return UserError("\n".join([title, *(f"  - {p}" for p in shown)]))


def listed(items: Sequence[object], *, most: int) -> str:
    """Return the first items, with commas between them; the rest is counted."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.65) -> str | None:
    """Return the choice most like `word`, or None if none has a similarity of `cutoff` (0 to 1).

    Leave out what all choices begin with: it makes any two of them similar. 0.65 is just below
    `warmup` and `warmup_steps`, and above pairs that have one syllable in common.
    """
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def did_you_mean(choice: str | None) -> str:
    """Return a clause that ends a message; empty without a choice to offer."""
    return f"; did you mean {choice}?" if choice else ""


def say(text: str) -> None:
    """Print a line to standard error; never raise, since a broken terminal must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:  # print would take standard output instead
            print(text, file=sys.stderr, flush=True)


def say_last(text: str) -> None:
    """Print a line before `os._exit`: what a thread still has to write (`LogCopy`) is written."""
    say(text)
    getattr(sys.stderr, "drain", lambda: None)()
