"""Find out whether all processes of a run are there, before JAX joins them.

JAX's own start-up ends a process with an abort when another one is missing, and names nobody. Here
process 0 listens on the coordinator's port, every other process says who it is and what it was
started with, and all get one answer: go on, or who is missing or differs. JAX takes the same port
afterwards.
"""

import contextlib
import socket
import time

from llamajax.errors import TransientError, UserError
from llamajax.processes.line_protocol import (
    Connection,
    Listener,
    Message,
    connect,
    has_fields,
    why_unreachable,
)
from llamajax.processes.process_facts import Facts, describe_difference

_RETRY_S = 0.2
_CONNECT_WITHIN_S = 5.0
_QUESTION = {"process_id": int, "num_processes": int, "host": str, "facts": dict}
_ANSWER = {"problem": (str, type(None)), "absent": bool}
# Process 0 gives up first; the others wait a little longer, in case it died in silence.
_ANSWER_WITHIN_S = 5.0


def call_roll(
    address: str, *, num_processes: int, process_id: int, timeout_s: float, facts: Facts
) -> None:
    """Return once all `num_processes` processes have come to `address` (HOST:PORT of process 0).

    facts: what this process was started with (`process_facts`). Raises UserError, the same for all
    that came, when two processes contradict each other; TransientError when one has not come after
    `timeout_s` seconds.
    """
    me = {
        "process_id": process_id,
        "num_processes": num_processes,
        "host": socket.gethostname(),
        "facts": dict(facts),
    }
    answer = (_serve if process_id == 0 else _join)(address, me, timeout_s)
    if answer["problem"]:
        raise (TransientError if answer["absent"] else UserError)(answer["problem"])


def _serve(address: str, me: Message, timeout_s: float) -> Message:
    """Collect what all processes say, and answer all of them. Return the answer."""
    deadline = time.monotonic() + timeout_s
    num_processes, came, problem, absent = me["num_processes"], {0: me}, None, False
    connections: list[Connection] = []
    listener = Listener(
        int(address.rpartition(":")[2]),
        who="process 0",
        fix="choose another port for the coordinator, or end what uses it",
    )
    with contextlib.closing(listener):
        while problem is None and len(came) < num_processes:
            left = deadline - time.monotonic()
            if left <= 0:
                problem, absent = _missing(came, num_processes, timeout_s), True
            # Wake up now and then, for peers that connected and say nothing are dropped then.
            for connection, (peer, *_) in listener.accept(within_s=min(max(left, 0.0), 1.0)):
                if not _is_process(peer):
                    connection.drop()
                    continue
                connections.append(connection)
                problem = problem or _contradiction(peer, came, num_processes)
                came.setdefault(peer["process_id"], peer)
        if problem is None:
            everyone = [came[rank] for rank in range(num_processes)]
            problem = describe_difference(
                [peer["facts"] for peer in everyone], [peer["host"] for peer in everyone]
            )
        answer = {"problem": problem, "absent": absent}
        for connection in connections:
            connection.send(answer)
        for connection in connections:
            connection.close(after_peer=True)
    return answer


def _is_process(peer: Message) -> bool:
    """Return whether a first message can be that of a process, of this run or of another."""
    if not has_fields(peer, _QUESTION) or not 0 <= peer["process_id"] < peer["num_processes"]:
        return False
    return all(isinstance(value, str | None) for value in peer["facts"].values())


def _join(address: str, me: Message, timeout_s: float) -> Message:
    """Tell process 0 who this is, as soon as it listens. Return its answer."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    reason = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = connect(host, int(port), timeout_s=min(left, _CONNECT_WITHIN_S))
        except OSError as error:
            reason = error
        else:
            reason = None
            with contextlib.closing(connection):
                connection.send(me)
                for answer in connection.receive(left + _ANSWER_WITHIN_S)[:1]:
                    if has_fields(answer, _ANSWER):
                        return answer
        time.sleep(_RETRY_S)
    raise TransientError(
        f"process {me['process_id']} of {me['num_processes']} found no process 0 at {address} "
        f"within backend.timeout_s = {timeout_s:g}: {why_unreachable(reason, host, int(port))}"
    )


def _missing(came: dict[int, Message], num_processes: int, timeout_s: float) -> str:
    absent = [str(rank) for rank in range(num_processes) if rank not in came]
    hosts = ", ".join(f"{rank} from {came[rank]['host']}" for rank in sorted(came) if rank)
    return (
        f"of {num_processes} processes {len(came)} came within backend.timeout_s = "
        f"{timeout_s:g}; missing: process {', '.join(absent)}. Came besides process 0: "
        f"{hosts or 'none'}. Start the missing ones with the same coordinator address, or correct "
        "the number"
    )


def _contradiction(peer: Message, came: dict[int, Message], num_processes: int) -> str | None:
    rank, count = peer["process_id"], peer["num_processes"]
    if count != num_processes:
        return (
            f"process {rank} on {peer['host']} was started for {count} processes, process 0 for "
            f"{num_processes}: start all with the same number"
        )
    if rank in came:
        return (
            f"two processes came as number {rank}, from {came[rank]['host']} and {peer['host']}: "
            "give each its own rank"
        )
    return None
