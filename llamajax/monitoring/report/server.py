"""Serve the page of runs on this machine; it reloads itself when their files change."""

import http.server
import posixpath
import re
import threading
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from llamajax.errors import UserError
from llamajax.monitoring.blackbox import BLACKBOX, boxes
from llamajax.monitoring.events import EVENTS, is_running
from llamajax.monitoring.jsonl import read_object
from llamajax.monitoring.metrics import METRICS
from llamajax.monitoring.report.run_data import prepared_data
from llamajax.monitoring.report.run_report import MALFORMED, read_runs, render

_HOST = "127.0.0.1"
# Browsers leave out port 80; `ssh -L` listens at ::1 as well.
_OWN_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_HTML, _TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"
_FILES = (METRICS, EVENTS, "config.json", "plan.json", "samples.jsonl", "profile/summary.json")


class ReportServer(http.server.ThreadingHTTPServer):
    """Answers `/` with the page and `/version` with a text that changes when the page does.

    port: 0 takes any free one. Raises UserError where another program has the port.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, workdirs: Sequence[Path], *, port: int, price_per_hour: float | None):
        self.workdirs, self._price = list(map(Path, workdirs)), price_per_hour
        self._lock, self._page = threading.Lock(), ("", "")
        try:
            super().__init__((_HOST, port), _Answer)
        except OSError as error:
            raise UserError(
                f"--serve={port}: {error.strerror}; give another port, as in --serve={port + 1}"
            ) from None

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://localhost:{self.server_port}/"

    def version(self) -> str:
        """Return what the page is made from: sizes and times of files, and whether runs are alive.

        A killed process is recognized by its lock alone.
        """
        stats = [f.stat() for w in self.workdirs for n in _FILES if (f := w / n).is_file()]
        parts = [f"{stat.st_size}.{stat.st_mtime_ns}" for stat in stats]
        return "-".join([*parts, *(str(is_running(workdir)) for workdir in self.workdirs)])

    def page(self) -> str:
        """Return the page of the files as they are now."""
        with self._lock:  # one at a time: reading many rows takes seconds
            if self._page[0] != (version := self.version()):
                runs = read_runs(self.workdirs, self._price)
                self._page = version, render(runs, version=version)
            return self._page[1]

    def linked_files(self) -> dict[str, Path]:
        """Return the files that the page links to, by the path that a browser asks for."""
        found = {f"/{BLACKBOX}/{box.name}": box for box in boxes(self.workdirs[0])}
        for workdir in self.workdirs:
            for each in prepared_data(workdir, read_object(workdir / "config.json")):
                if page := each["page"]:  # browsers drop what leads above `/`
                    found[posixpath.normpath(f"/{page}")] = workdir / page
        return found


class _Answer(http.server.BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer a browser of this machine; a page of another site has another Host."""
        if not _OWN_HOST.fullmatch(self.headers.get("Host", "")):
            self.send_error(403)
            return
        status = 200
        try:
            text, kind = self._found(self.path.partition("?")[0])
        except (OSError, *MALFORMED) as error:
            status, text, kind = 500, f"error: {error}\n", _TEXT
        if not kind:
            self.send_error(404)
            return
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        if status != 200:
            self.send_header("Refresh", "5")  # the file may be readable by then
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _found(self, path: str) -> tuple[str, str]:
        """Return the text at a path, and its type; no type where there is nothing."""
        if path == "/":
            return self.server.page(), _HTML
        if path == "/version":
            return self.server.version(), _TEXT
        if file := self.server.linked_files().get(urllib.parse.unquote(path)):
            return file.read_text(encoding="utf-8"), _HTML if file.suffix == ".html" else _TEXT
        return "", ""

    def log_message(self, *_: object) -> None:
        """Print nothing for each request."""

    def handle_one_request(self) -> None:
        """A browser that leaves in the middle of an answer is no error."""
        try:
            super().handle_one_request()
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
