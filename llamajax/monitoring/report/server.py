"""Serve the page of runs on this machine; it reloads itself when their files change."""

import http.server
import threading
from collections.abc import Sequence
from pathlib import Path

from llamajax.errors import UserError
from llamajax.monitoring.blackbox import BLACKBOX, boxes
from llamajax.monitoring.events import EVENTS
from llamajax.monitoring.metrics import METRICS
from llamajax.monitoring.report.run_report import read_runs, render

_HOST = "127.0.0.1"
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
        """Where a browser finds the page."""
        return f"http://localhost:{self.server_port}/"

    def version(self) -> str:
        """Return the sizes and times of the files that the page is made from."""
        stats = [f.stat() for w in self.workdirs for n in _FILES if (f := w / n).is_file()]
        return "-".join(f"{stat.st_size}.{stat.st_mtime_ns}" for stat in stats)

    def page(self) -> str:
        """Return the page of the files as they are now."""
        with self._lock:  # one at a time: reading many rows takes seconds
            if self._page[0] != (version := self.version()):
                runs, price = read_runs(self.workdirs, self._price)
                self._page = version, render(runs, price_per_hour=price, version=version)
            return self._page[1]


class _Answer(http.server.BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer a browser of this machine; a page of another site has another Host."""
        name = self.headers.get("Host", "").rpartition(":")[0]
        if name not in ("localhost", _HOST):
            self.send_error(403)
            return
        path, kind = self.path.partition("?")[0], "text/html; charset=utf-8"
        if path == "/":
            text = self.server.page()
        elif path == "/version":
            text, kind = self.server.version(), "text/plain"
        elif box := self._box(path):
            text, kind = box.read_text(encoding="utf-8"), "text/plain; charset=utf-8"
        else:
            self.send_error(404)
            return
        body = text.encode("utf-8", "replace")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _box(self, path: str) -> Path | None:
        found = boxes(self.server.workdirs[0])
        return next((box for box in found if path == f"/{BLACKBOX}/{box.name}"), None)

    def log_message(self, *_: object) -> None:
        """Print nothing for each request."""

    def handle_one_request(self) -> None:
        """A browser that leaves in the middle of an answer is no error."""
        try:
            super().handle_one_request()
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
