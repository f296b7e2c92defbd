"""An S3 service of one bucket on this machine: a script that `object_store.running` starts.

    python s3_store.py PORT [HOLD]

As far as TensorStore asks: objects with ranges and conditions, lists of PAGE keys at a time, errors
in XML. Every FAILS-th request is answered with 503, as Amazon's is when too many come. No object is
written on the condition of its tag, as with OpenStack's Swift. HOLD: as in `object_store.py`.
"""

import hashlib
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

BUCKET, KEY_ID = "bucket", "key"
PAGE, FAILS = 5, 150


class Handler(BaseHTTPRequestHandler):
    """One connection; `objects` and `count` are of the service."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    objects: ClassVar[dict[str, bytes]] = {}
    lock = threading.Lock()
    count = 0
    hold: Path | None = None

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlparse(self.path)
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        while self.hold and self.hold.exists() and self._is_held(key):
            self.hold.with_suffix(".held").touch()
            time.sleep(0.05)
        with self.lock:
            Handler.count += 1
            who = self.headers.get("Authorization", "").partition("Credential=")[2]
            if who.startswith("expired/"):
                self._error(400, "ExpiredToken")
            elif not who.startswith(f"{KEY_ID}/"):
                self._error(403, "InvalidAccessKeyId")
            elif bucket != BUCKET:
                self._error(404, "NoSuchBucket")
            elif Handler.count % FAILS == 0:
                self._error(503, "SlowDown")
            elif key:
                self._handle_object(key, body)
            else:
                self._list(**{name: v[0] for name, v in parse_qs(url.query).items()})

    do_GET = do_HEAD = do_PUT = do_DELETE = _handle

    def _is_held(self, key: str) -> bool:
        return self.command == "PUT" and key.endswith(self.hold.read_text())

    def _handle_object(self, key: str, body: bytes) -> None:
        found = self.objects.get(key)
        tag = found is not None and f'"{hashlib.md5(found).hexdigest()}"'
        wanted = self.headers.get("If-Match")
        if wanted and self.command == "PUT":
            self._error(501, "NotImplemented")
        elif found is None and (wanted or self.command in ("GET", "HEAD")):
            self._error(404, "NoSuchKey")
        elif wanted not in (None, tag) or (found and self.headers.get("If-None-Match") == "*"):
            self._error(412, "PreconditionFailed")
        elif self.command == "PUT":
            self.objects[key] = body
            self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        elif self.command == "DELETE":
            self.objects.pop(key, None)
            self._answer(204)
        elif self.headers.get("If-None-Match") == tag:
            self._answer(304, ETag=tag)
        elif span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(span[1]), min(int(span[2] or len(found)) + 1, len(found))
            if start >= len(found):
                self._error(416, "InvalidRange")
                return
            part = f"bytes {start}-{stop - 1}/{len(found)}"
            self._answer(206, found[start:stop], ETag=tag, Content_Range=part)
        else:
            self._answer(200, found, ETag=tag)

    def _list(self, prefix: str = "", **query: str) -> None:
        after = query.get("continuation-token", "")
        keys = sorted(k for k in self.objects if k.startswith(prefix) and k > after)
        more = len(keys) > PAGE
        found = "".join(f"<Contents><Key>{escape(k)}</Key></Contents>" for k in keys[:PAGE])
        if more:
            found += f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>"
        text = f"<IsTruncated>{str(more).lower()}</IsTruncated>{found}"
        self._answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())


if __name__ == "__main__":
    Handler.hold = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
