"""The command line of `launch`, checked before anything is started."""

import dataclasses
import itertools
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from llamajax.config.flags import Flag
from llamajax.errors import UserError, combine

FLAGS = (
    Flag(
        name="processes_per_node",
        metavar="N",
        annotation=int,
        doc="workers on this node, each with its share of the node's devices",
    ),
    Flag(name="nodes", metavar="M", annotation=int, default=1, doc="nodes of the run"),
    Flag(
        name="node_rank",
        metavar="R",
        annotation=int | None,
        default=None,
        doc="number of this node, from 0; required with several nodes",
    ),
    Flag(
        name="coordinator",
        metavar="HOST:PORT",
        annotation=str | None,
        default=None,
        doc="node 0 as all nodes reach it; the launchers meet at PORT + 1. none: this machine",
    ),
    Flag(
        name="max_restarts",
        metavar="K",
        annotation=int,
        default=3,
        doc="failures in a row, without a newer checkpoint, after which all workers are started "
        "again; 0: never",
    ),
    Flag(
        name="backoff_s",
        metavar="S",
        annotation=float,
        default=1.0,
        doc="seconds before the first restart; doubled for each further one, up to a minute",
    ),
    Flag(
        name="timeout_s",
        metavar="S",
        annotation=float,
        default=300.0,
        doc="seconds without progress (no worker logs or steps) that count as a failure; also how "
        "long nodes wait for each other",
    ),
    Flag(
        name="log_dir",
        metavar="DIR",
        annotation=str | None,
        default=None,
        doc="where worker_RANK.ATTEMPT.log go; none: logs in the command's --workdir, else ./logs",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """This node's part of a launch, and the command that every worker runs."""

    command: tuple[str, ...]
    processes_per_node: int
    nodes: int
    node_rank: int
    coordinator: tuple[str, int] | None  # host, port; None: one node, a free port each attempt
    max_restarts: int
    backoff_s: float
    timeout_s: float
    log_dir: Path

    @property
    def num_processes(self) -> int:
        """Workers on all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def ranks(self) -> range:
        """Ranks of this node's workers."""
        first = self.node_rank * self.processes_per_node
        return range(first, first + self.processes_per_node)


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before the first `--`, and the command after it."""
    before = list(itertools.takewhile(lambda token: token != "--", argv))
    return before, list(argv[len(before) + 1 :])


def build_options(flags: SimpleNamespace, command: Sequence[str]) -> LaunchOptions:
    """Return the options of a launch. Raises one UserError with everything that is wrong."""
    if problems := _problems(flags, command):
        raise combine(problems, title="this launch is not possible:")
    address = None
    if flags.coordinator is not None:
        host, _, port = flags.coordinator.rpartition(":")
        address = (host, int(port))
    return LaunchOptions(
        command=tuple(command),
        processes_per_node=flags.processes_per_node,
        nodes=flags.nodes,
        node_rank=flags.node_rank or 0,
        coordinator=address,
        max_restarts=flags.max_restarts,
        backoff_s=flags.backoff_s,
        timeout_s=flags.timeout_s,
        log_dir=Path(flags.log_dir) if flags.log_dir else _default_log_dir(command),
    )


def _problems(flags: SimpleNamespace, command: Sequence[str]) -> list[str]:
    found = []
    for name in ("processes_per_node", "nodes"):
        if getattr(flags, name) < 1:
            found.append(f"--{name}={getattr(flags, name)}: must be at least 1")
    for name in ("max_restarts", "backoff_s"):
        if getattr(flags, name) < 0:
            found.append(f"--{name}={getattr(flags, name):g}: must not be negative")
    if not flags.timeout_s > 0:
        found.append(f"--timeout_s={flags.timeout_s:g}: must be positive")
    if flags.nodes > 1 and flags.node_rank is None:
        found.append(f"--nodes={flags.nodes} needs --node_rank, from 0 to {flags.nodes - 1}")
    if flags.nodes > 1 and flags.coordinator is None:
        found.append(f"--nodes={flags.nodes} needs --coordinator=HOST:PORT of node 0")
    if flags.node_rank is not None and not 0 <= flags.node_rank < max(flags.nodes, 1):
        found.append(f"--node_rank={flags.node_rank}: must be from 0 to --nodes - 1")
    if flags.coordinator is not None:
        match = re.fullmatch(r".+:(\d+)", flags.coordinator)
        if not match or not 0 < int(match.group(1)) < 65535:
            found.append(
                f"--coordinator={flags.coordinator}: is not HOST:PORT with a port below 65535, "
                "for example node0:8476"
            )
    if not command:
        found.append("no command: write it after --, as in `-- python -m llamajax.train ...`")
    elif shutil.which(command[0]) is None:
        found.append(f"{command[0]}: there is no such program; the command starts after --")
    return found


def _default_log_dir(command: Sequence[str]) -> Path:
    """Return `logs` in the --workdir of the command, else in the current directory."""
    for token, following in zip(command, [*command[1:], ""], strict=True):
        if token.startswith("--workdir="):
            return Path(token.partition("=")[2]) / "logs"
        if token == "--workdir" and following:
            return Path(following) / "logs"
    return Path("logs")


def make_log_dir(log_dir: Path) -> None:
    """Make the directory of the logs. Raises UserError when it cannot be written."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--log_dir={log_dir}: {error.strerror}; choose a directory that can be written"
        ) from None
