"""A web server of a folder with range requests, which fails as servers do: on a schedule, not by chance."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "429", "cut", "short", "slow", "close", "long", "whole")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler))
        self.folder, self.lock, self.requests = folder, threading.Lock(), []
        self.every = 0
        """Every n-th request fails; 0: none."""
        self.down = False
        self.silence = 0.05
        """Seconds before a slow answer."""
        self.missing_status = 404

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        wanted = self.headers.get("Range")
        with server.lock:
            server.requests.append((self.path, wanted))
            number = len(server.requests)
        fault = FAULTS[number // server.every % len(FAULTS)] if server.every and number % server.every == 0 else ""
        if server.down or fault in ("503", "429"):
            return self.answer(503 if server.down else int(fault), b"")
        if not path.is_file():
            return self.answer(server.missing_status, b"")
        content, stat = path.read_bytes(), path.stat()
        headers = {"ETag": f'"{stat.st_mtime_ns}"', "Accept-Ranges": "bytes"}
        if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return self.answer(412, b"")
        broken = {"cut": fault in ("cut", "close"), "nothing": fault == "close"}
        if fault == "slow":
            time.sleep(server.silence)
        if wanted is None or fault == "whole":  # a server that knows no ranges, or forgets them
            return self.answer(200, content, headers, **broken)
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        if fault == "short":  # complete by its own account
            part = part[: len(part) // 2]
        if fault == "long":
            part += b"more"
        self.answer(206, part, headers, **broken)

    def answer(self, code: int, body: bytes, headers=None, cut: bool = False, nothing: bool = False) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: 0 if nothing else len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
