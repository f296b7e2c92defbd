"""The kernel's lock on a file: it ends with the process that holds it, however that dies."""

import fcntl
import time
from typing import IO

WAIT_S = 10.0  # a killed process holds its lock until its last write is done
_RETRY_S = 0.2


def lock_file(file: IO, *, within_s: float | None = None) -> str | None:
    """Lock an open file until it is closed. Return why not, where the file system has no locks.

    within_s: how long to wait for another process that holds it (None: WAIT_S, seconds). Raises
    BlockingIOError after that. Other errors (ENOSYS, ENOLCK, EOPNOTSUPP of Lustre, NFS and others)
    say nothing about other processes.
    """
    deadline = time.monotonic() + (WAIT_S if within_s is None else within_s)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)
        except OSError as error:
            return error.strerror or str(error)
