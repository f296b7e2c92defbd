"""Object stores of one bucket on this machine: what tests start, and the script of Google's.

    python object_store.py PORT [HOLD]

gcp-storage-emulator with what TensorStore needs besides: the generation of what is read, reads and
writes that are conditional on it, and the errors of a missing bucket and range. HOLD: a file; an
upload whose name ends as its text says is not answered until the file is gone, and a file HOLD.held
says that there is one. Of S3 there are `s3_store.py` and, where it is installed, moto's server.
"""

import contextlib
import importlib.util
import io
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

BUCKET = "bucket"
MOTO = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
SCRIPTS = {"gs": Path(__file__), "s3": Path(__file__).with_name("s3_store.py")}


def serve(port: int, hold: Path | None) -> None:
    """Serve requests until killed, one at a time; an idle connection keeps no other waiting."""
    from gcp_storage_emulator import server

    lock = threading.Lock()

    class Handler(server.RequestHandler):
        """The emulator's, with generations and preconditions."""

        generation: str | None = None
        wbufsize = -1  # headers and body in one packet

        def _current(self, bucket: str, name: str) -> str:
            from gcp_storage_emulator.exceptions import NotFound

            try:
                return self.storage.get_file_obj(bucket, name)["generation"]
            except NotFound:
                return "0"

        def _refused(self) -> bool:
            """Answer a request whose precondition does not hold."""
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.rfile = io.BytesIO(body)
            name = query.get("name") or unquote(rest.removeprefix("/"))
            if found := re.search(rb'"name": *"([^"]+)"', body if not name else b""):
                name = found.group(1).decode()  # of an upload in several parts
            if bucket and bucket != BUCKET:
                return self._end(HTTPStatus.NOT_FOUND)
            current, self.name = self._current(bucket, name), name
            self.generation = current if query.get("alt") == "media" else None
            if query.get("ifGenerationMatch", current) != current:
                status = HTTPStatus.PRECONDITION_FAILED
            elif query.get("ifGenerationNotMatch") == current:
                status = HTTPStatus.NOT_MODIFIED
            elif self._is_behind(bucket, name):
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            else:
                return False
            return self._end(status)

        def _is_behind(self, bucket: str, name: str) -> bool:
            """Return whether the range that is asked for begins behind the end."""
            start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            return bool(start) and int(start[1]) >= int(
                self.storage.get_file_obj(bucket, name)["size"]
            )

        def _end(self, status: HTTPStatus) -> bool:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

        def _wait(self) -> None:
            text = hold.read_text() if hold and hold.exists() and self.command == "POST" else ""
            while text and hold.exists() and self.name.endswith(text):
                hold.with_suffix(".held").touch()
                time.sleep(0.05)

        def end_headers(self) -> None:
            if self.generation not in (None, "0"):
                self.send_header("x-goog-generation", self.generation)
            super().end_headers()

        def _handle(self) -> None:
            with lock:
                if not self._refused():
                    self._wait()
                    getattr(super(), f"do_{self.command}")()

        do_GET = do_POST = do_DELETE = _handle

    server.RequestHandler = Handler
    server.server.HTTPServer = ThreadingHTTPServer
    ThreadingHTTPServer.request_queue_size = 128  # a dropped connection is tried after 1 s
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


def environment(port: int) -> dict[str, str]:
    """What tells TensorStore where the store is, of either kind."""
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    return {"TENSORSTORE_GCS_HTTP_URL": url, "AWS_ENDPOINT_URL": url} | keys


@contextlib.contextmanager
def running(kind: str, port: int, hold: Path | None = None) -> Iterator[subprocess.Popen]:
    """A store in a process of its own, which is killed at the end. kind: gs, s3 or moto."""
    command = MOTO if kind == "moto" else [sys.executable, str(SCRIPTS[kind])]
    command = [*command, str(port), *([str(hold)] if hold else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command} does not answer"
            time.sleep(0.1)
        if kind == "moto":
            url = f"http://127.0.0.1:{port}/{BUCKET}"
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
        yield process
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def need_package(kind: str) -> None:
    """Skip where the emulator is not installed. Nothing in the package needs it."""
    if kind == "gs" and importlib.util.find_spec("gcp_storage_emulator") is None:
        pytest.skip("gcp_storage_emulator is not installed: pip install '.[test]'")


def kinds() -> list[str]:
    """The stores to test with."""
    return ["gs", "s3", *(["moto"] if importlib.util.find_spec("moto") else [])]


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
