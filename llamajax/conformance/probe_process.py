"""The process in which probes run: `python -m llamajax.conformance.probe_process FD`.

It reads a request from the socket of file descriptor FD, and sends messages there. A probe that
dies takes this process with it; the parent then knows which one it was.
"""

import faulthandler
import signal
import socket
import sys

_REQUEST_WITHIN_S = 60.0


def main() -> int:
    """Run the requested probes in order; return 2 where the backend refuses to start."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks where a probe hangs
    # Not before: importing JAX, or a plugin with it, may hang as well.
    from llamajax.backends import exit_with_launcher
    from llamajax.processes.line_protocol import Connection

    exit_with_launcher()
    parent = Connection(socket.socket(fileno=int(sys.argv[1])))
    (request,) = parent.receive(within_s=_REQUEST_WITHIN_S)
    from llamajax.conformance.probe_loop import run_probes

    return run_probes(request, parent)


if __name__ == "__main__":
    sys.exit(main())
