"""A server of files on this machine, which tells of each file what a test wants it to tell."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Files:
    """What the server has and how it answers.

    headers: beside those of HTTP, such as an ETag, by path. statuses: by path, in place of 200. short: paths of which
    the second half never comes. fetched: the paths that were read whole.
    """

    content: dict[str, bytes]
    headers: dict[str, Mapping[str, str]] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    short: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def serving(content: Mapping[str, bytes]) -> Iterator[Files]:
    """A server of `content`, by path (`/folder/file`), with an HTML page of links for each folder."""
    files, stopped = Files(dict(content)), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.endswith("/"):
                below = {name.removeprefix(path) for name in files.content if name.startswith(path)}
                links = {name.partition("/")[0] + ("/" if "/" in name else "") for name in below}
                page = "".join(f'<a href="{link}">{link}</a>' for link in sorted(links)).encode()
                self.reply(200 if below else 404, page, {"Content-Type": "text/html"})
            elif any(name.startswith(f"{path}/") for name in files.content):
                self.reply(301, b"", {"Location": f"{path}/"})
            else:
                status = files.statuses.get(path, 200 if path in files.content else 404)
                self.reply(status, files.content.get(path, b""), files.headers.get(path, {}))

        do_HEAD = do_GET

        def reply(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.path in files.short:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                stopped.wait()
                return
            self.wfile.write(content)
            if status == 200 and not self.path.endswith("/"):
                files.fetched.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        files.address = f"http://127.0.0.1:{http.server_port}"
        try:
            yield files
        finally:
            stopped.set()
            http.shutdown()
