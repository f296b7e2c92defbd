"""The flags of `launch`, checked before anything is started."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from llamajax.config import Flags, Mistyped, key, parse_address


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions(Flags):
    """Flags of `launch`, and the command after `--`, which every worker runs."""

    processes_per_node: int = key(
        "workers on this node, each with its share of the node's devices", metavar="N", at_least=1
    )
    nodes: int = key("nodes of the run", metavar="M", default=1, at_least=1)
    node_rank: int | None = key(
        "number of this node, from 0; required with several nodes", metavar="R", default=None
    )
    coordinator: str | None = key(
        "node 0 as all nodes reach it; the launchers meet at PORT + 1. none: this machine",
        metavar="HOST:PORT",
        default=None,
    )
    max_restarts: int = key(
        "failures in a row, without a newer checkpoint, after which all workers are started again; "
        "0: never",
        metavar="K",
        default=3,
        at_least=0,
    )
    backoff_s: float = key(
        "seconds before the first restart; doubled for each further one, up to a minute",
        metavar="S",
        default=1.0,
        at_least=0,
    )
    timeout_s: float = key(
        "seconds without progress (no worker logs or steps) that count as a failure; also how long "
        "nodes wait for each other",
        metavar="S",
        default=300.0,
        above=0,
    )
    log_dir: str | None = key(
        "where worker_RANK.ATTEMPT.log go; none: logs in the command's --workdir, else ./logs",
        metavar="DIR",
        default=None,
        is_path=True,
    )
    command: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.nodes > 1 and self.node_rank is None:
            yield f"--nodes={self.nodes} needs --node_rank, from 0 to {self.nodes - 1}"
        if self.nodes > 1 and self.coordinator is None:
            yield f"--nodes={self.nodes} needs --coordinator=HOST:PORT of node 0"
        if self.node_rank is not None and not 0 <= self.node_rank < max(self.nodes, 1):
            yield f"--node_rank={self.node_rank}: must be from 0 to --nodes - 1"
        if self.coordinator is not None:
            try:
                if parse_address(self.coordinator)[1] == 65535:
                    yield f"--coordinator={self.coordinator}: has no port + 1 for the launchers"
            except Mistyped as problem:
                yield f"--coordinator={self.coordinator}: {problem}"
        if not self.command:
            yield "no command: write it after --, as in `-- python -m llamajax.train ...`"
        elif shutil.which(self.command[0]) is None:
            yield f"{self.command[0]}: there is no such program; the command starts after --"

    @property
    def num_processes(self) -> int:
        """Workers on all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def ranks(self) -> range:
        """Ranks of this node's workers."""
        first = (self.node_rank or 0) * self.processes_per_node
        return range(first, first + self.processes_per_node)

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of process 0; None: this machine, and a free port for each attempt."""
        if self.coordinator is None:
            return None
        return parse_address(self.coordinator)

    @property
    def logs(self) -> Path:
        """Directory of the workers' logs: by default `logs` in the --workdir of the command."""
        if self.log_dir:
            return Path(self.log_dir)
        for token, following in zip(self.command, [*self.command[1:], ""], strict=True):
            if token.startswith("--workdir="):
                return Path(token.partition("=")[2]).expanduser() / "logs"
            if token == "--workdir" and following:
                return Path(following) / "logs"
        return Path("logs")
