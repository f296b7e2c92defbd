"""Start Python commands quickly: fork them from one process that has imported JAX already.

`run` and `Popen` take what `subprocess.run` and `subprocess.Popen` take, for the commands
`[sys.executable, "-m", "llamajax.VERB", ...]`, `[sys.executable, "-c", CODE, ...]` and
`[sys.executable, "script.py", ...]`. The new process has its own id, arguments, environment,
directory and streams, and ends as Python does. It is forked before any JAX backend exists. What a
fork cannot imitate (see `_is_cold`) starts the ordinary way; a test of the start itself uses
`subprocess`.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import types
import warnings
from typing import NamedTuple

# The environment of the server: a test's own changes to it must not reach other tests.
_ENVIRONMENT = dict(os.environ)
# The variables that JAX reads while it is imported, how, and what it takes without; a child sets
# them as options.
_OPTIONS = {
    "JAX_PLATFORMS": (str, None),
    "JAX_NUM_CPU_DEVICES": (int, -1),
    "JAX_COMPILATION_CACHE_DIR": (str, None),
    "JAX_ENABLE_COMPILATION_CACHE": (lambda text: text.lower() in ("1", "true", "yes", "on"), True),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (float, 1.0),
}
# Those that act while Python and its libraries start: no fork can follow them.
_AT_START = ("PYTHON", "JAX_", "TF_", "GRPC_", "LD_", "MALLOC_", "GLIBC_")
_SERVED = ("stdin", "stdout", "stderr", "env", "cwd", "text", "start_new_session", "process_group")
_IMPORTS = (
    "llamajax.training.run", "llamajax.evaluation.evaluator", "llamajax.decoding.generator",
    "llamajax.decoding.printed_texts", "llamajax.planning.planner", "llamajax.planning.search",
    "llamajax.launching.launcher", "llamajax.replaying.replay_step",
    "llamajax.conformance.probe_runner", "llamajax.formats.weights",
    "llamajax.checkpoint.orbax_writer", "llamajax.corpus.preparation",
)  # fmt: skip
_TUNABLES = "GLIBC_TUNABLES"
_LENGTH = struct.Struct("i")


class _Request(NamedTuple):
    """What a child shall be."""

    command: list[str]
    env: dict[str, str]
    options: dict[str, object]
    cwd: str
    new_session: bool
    group: int


class _Server:
    """The client's side of the process that forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT | {_TUNABLES: "glibc.malloc.hugetlb=0"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        atexit.register(self.close)

    def start(self, request: _Request, streams: tuple[int, int, int]) -> tuple[int, socket.socket]:
        """The new process's id, and the socket that will tell its status."""
        message = json.dumps(request).encode()
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *streams]
            socket.send_fds(self._socket, [_LENGTH.pack(len(message))], fds)
            self._socket.sendall(message)
        return _LENGTH.unpack(ours.recv(_LENGTH.size))[0], ours

    def close(self) -> None:
        """End it and its children."""
        self._socket.close()
        self._process.wait()


class _Forked(subprocess.Popen):
    """A child of the server that is used like one of this process."""

    _server: _Server | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        pipes, (*_, new_session, group) = rest[3:9], rest
        child_ends = zip((pipes[0], pipes[3], pipes[5]), range(3), strict=True)
        streams = tuple(own if fd == -1 else fd for fd, own in child_ends)
        env = dict(os.environ) if env is None else dict(env)
        options = {
            name: _OPTIONS[name][1] if text is None else _OPTIONS[name][0](text)
            for name, text in _changes(env).items()
        }
        if _Forked._server is None:
            _Forked._server = _Server()
        request = _Request(
            list(map(str, args)), env, options, str(cwd or os.getcwd()), new_session, group
        )
        self.pid, self._status = _Forked._server.start(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, _deadstate=None, **_):
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid and self.returncode is None:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags):
        try:
            found = self._status.recv(_LENGTH.size, socket.MSG_DONTWAIT if wait_flags else 0)
        except BlockingIOError:
            return 0, 0
        self._status.close()
        if not found:
            raise RuntimeError(f"the server of {self.args} is gone")
        return self.pid, _LENGTH.unpack(found)[0]


def Popen(command, **kwargs) -> subprocess.Popen:
    """`subprocess.Popen`, forked where that is the same."""
    return (subprocess.Popen if _is_cold(command, kwargs) else _Forked)(command, **kwargs)


def run(
    command, *, input=None, capture_output=False, timeout=None, check=False, **kwargs
) -> subprocess.CompletedProcess:
    """`subprocess.run`, forked where that is the same."""
    if input is not None:
        kwargs["stdin"] = subprocess.PIPE
    if capture_output:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **kwargs) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _is_cold(command, kwargs) -> bool:
    """Whether only a new Python will do: its options, streams or environment are special."""
    if command[0] != sys.executable or kwargs.keys() - set(_SERVED):
        return True
    if command[1].startswith("-") and command[1] not in ("-m", "-c"):
        return True
    env = kwargs.get("env")
    return not _changes(os.environ if env is None else env).keys() <= _OPTIONS.keys()


def _changes(env) -> dict[str, str | None]:
    """The variables of Python's start that are not as the server had them; None: not set."""
    names = {name for name in (*_ENVIRONMENT, *env) if name.startswith(_AT_START)}
    return {n: env.get(n) for n in names if env.get(n) != _ENVIRONMENT.get(n)}


# --- the server's side ---------------------------------------------------------------------------


def _serve(requests: socket.socket) -> _Request:
    """Fork for every request; returns in a child only."""
    with contextlib.ExitStack() as owned:
        select = owned.enter_context(selectors.DefaultSelector())
        select.register(owned.enter_context(requests), selectors.EVENT_READ)
        children: dict[int, tuple[int, socket.socket]] = {}
        while True:
            for key, _ in select.select():
                if key.fileobj is not requests:
                    select.unregister(key.fd)
                    pid, status = children.pop(key.fd)
                    os.close(key.fd)
                    status.send(_LENGTH.pack(os.waitpid(pid, 0)[1]))
                    status.close()
                    continue
                header, fds, *_ = socket.recv_fds(requests, _LENGTH.size, 4)
                if not header:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                wanted = _LENGTH.unpack(header)[0]
                request = _Request(*json.loads(requests.recv(wanted, socket.MSG_WAITALL)))
                status = socket.socket(fileno=fds[0])
                pid = os.fork()
                if pid == 0:
                    for number, fd in enumerate(fds[1:]):
                        os.dup2(fd, number)
                        os.close(fd)
                    status.close()
                    for fd, (_, other) in children.items():
                        os.close(fd)
                        other.close()
                    return request
                for fd in fds[1:]:
                    os.close(fd)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = (pid, status)
                select.register(pidfd, selectors.EVENT_READ)
                status.send(_LENGTH.pack(pid))


def _become(request: _Request, imported: dict[str, str]) -> None:
    """Run the command of a request as a new Python would."""
    if request.new_session:
        os.setsid()
    elif request.group != -1:
        os.setpgid(0, request.group)
    os.chdir(request.cwd)
    # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Huge pages are asked for by starting again, which would undo the fork.
    small_pages = os.environ[_TUNABLES]
    os.environ.clear()
    os.environ.update({_TUNABLES: small_pages} | imported | request.env)
    for name, value in request.options.items():
        sys.modules["jax"].config.update(name.lower(), value)
    sys.orig_argv = request.command
    kind, *rest = request.command[1:]
    if kind == "-m":
        sys.argv, sys.path[0] = rest, request.cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def _main() -> None:
    before = dict(os.environ)
    for name in _IMPORTS:
        __import__(name)
    imported = {n: v for n, v in os.environ.items() if n not in before}
    gc.freeze()
    # Threads of libraries wait for work that the server never gives them.
    warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))), imported)


if __name__ == "__main__":
    _main()
