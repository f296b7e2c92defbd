"""Who is there: a roll call of all processes before JAX joins them.

JAX's own start-up ends a process with an abort when another one is missing, and names nobody. Here
process 0 listens on the coordinator's port, every other process says who it is and what it was
started with, and all get one answer: go on, or who is missing or differs. JAX takes the same port
afterwards.
"""

import contextlib
import errno
import json
import socket
import time
from typing import Any

from llamajax.errors import TransientError, UserError
from llamajax.processes.differences import Facts, difference

_RETRY_S = 0.2
_PATIENCE_S = 5.0  # with one that connected and says nothing
_MAX_BYTES = 1 << 20


def call_roll(
    address: str, *, num_processes: int, process_id: int, timeout_s: float, facts: Facts
) -> None:
    """Return once all `num_processes` processes have come to `address` (HOST:PORT of process 0).

    facts: what this process was started with (`process_facts`). Raises UserError, the same for all
    that came, when two processes contradict each other; TransientError when one has not come after
    `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    place = (host.strip("[]"), int(port))
    me = {"process_id": process_id, "num_processes": num_processes, "host": socket.gethostname()}
    me["facts"] = dict(facts)
    if process_id == 0:
        _preside(place, me, deadline=deadline, timeout_s=timeout_s)
    else:
        _attend(place, me, deadline=deadline, timeout_s=timeout_s)


def _preside(
    place: tuple[str, int], me: dict[str, Any], *, deadline: float, timeout_s: float
) -> None:
    num_processes = me["num_processes"]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listening(place[1]))
        came: dict[int, dict[str, Any]] = {}
        connections: list[socket.socket] = []
        problem, absent = None, False
        while problem is None and len(came) < num_processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, peer = listener.accept()
            except TimeoutError:
                problem, absent = _missing(came, num_processes, timeout_s), True
                break
            stack.enter_context(connection)
            who = _receive(connection, time.monotonic() + _PATIENCE_S)
            if who is None or not who.keys() >= {"process_id", "num_processes", "host"}:
                continue  # a stranger, or a process that died at once
            problem = _contradiction(who, peer[0], came, num_processes)
            came.setdefault(who["process_id"], who)
            connections.append(connection)
        if problem is None:
            everyone = [me, *(came[rank] for rank in range(1, num_processes))]
            facts = [who.get("facts", {}) for who in everyone]
            problem = difference(facts, [who["host"] for who in everyone])
        for connection in connections:
            with contextlib.suppress(OSError):
                _send(connection, {"problem": problem, "absent": absent})
        for connection in connections:
            _receive(connection, time.monotonic() + 1)  # they hang up first: the port stays free
    if problem:
        raise (TransientError if absent else UserError)(problem)


def _attend(
    place: tuple[str, int], me: dict[str, Any], *, deadline: float, timeout_s: float
) -> None:
    reason = "nothing listens there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(place, timeout=min(left, _PATIENCE_S)) as connection:
                _send(connection, me)
                # Process 0 gives up first; this only guards against its silent death.
                answer = _receive(connection, deadline + _PATIENCE_S)
        except OSError as error:
            reason, answer = str(error), None
        if answer is not None:
            if answer["problem"]:
                raise (TransientError if answer["absent"] else UserError)(answer["problem"])
            return
        time.sleep(_RETRY_S)
    raise TransientError(
        f"process {me['process_id']} of {me['num_processes']} found no process 0 at "
        f"{place[0]}:{place[1]} within backend.timeout_s = {timeout_s:g} ({reason}): start it "
        "there, or correct the coordinator's address"
    )


def _listening(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        kind = TransientError if error.errno == errno.EADDRINUSE else UserError
        raise kind(
            f"process 0 cannot listen on port {port}: {error.strerror}; choose another port for "
            "the coordinator, or end what uses it"
        ) from None


def _missing(came: dict[int, dict[str, Any]], num_processes: int, timeout_s: float) -> str:
    absent = [str(rank) for rank in range(1, num_processes) if rank not in came]
    hosts = ", ".join(f"{rank} from {came[rank]['host']}" for rank in sorted(came)) or "none"
    return (
        f"of {num_processes} processes {len(came) + 1} came within backend.timeout_s = "
        f"{timeout_s:g}; missing: process {', '.join(absent)}. Came besides process 0: {hosts}. "
        "Start the missing ones with the same coordinator address, or correct the number"
    )


def _contradiction(
    who: dict[str, Any], host: str, came: dict[int, dict[str, Any]], num_processes: int
) -> str | None:
    rank, count = who["process_id"], who["num_processes"]
    if count != num_processes:
        return (
            f"process {rank} on {who['host']} ({host}) was started for {count} processes, "
            f"process 0 for {num_processes}: start all with the same number"
        )
    if rank in came:
        return (
            f"two processes came as number {rank}, from {came[rank]['host']} and {who['host']}: "
            "give each its own rank"
        )
    return None


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.settimeout(_PATIENCE_S)
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
    """One line of JSON, or None where the other side hung up, stayed silent or said else."""
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < _MAX_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            part = connection.recv(65536)
            if not part:
                return None
            text += part
        value = json.loads(text)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
