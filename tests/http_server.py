"""A file server on 127.0.0.1 that misbehaves on request, for the tests of everything that downloads."""

import hashlib
import io
import json
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Served:
    """One file and its faults.

    Args:
        content: body of the file.
        content_type: value of that header; "" leaves the header away.
        etag: version, sent as ETag and compared with If-Range; None sends none.
        status: of an answer that holds the whole file.
        statuses: statuses of the first answers, used up one per request; afterwards all is well.
        retry_after: Retry-After header of those answers.
        drop_after: body bytes after which the connection is cut; None never.
        n_drops: how many answers are cut; -1 all.
        stall: waits for the server to close instead of cutting the connection.
        ignore_range: answers every request with the whole file.
        wrong_range: answers a range request with the part that starts at byte 0.
        ignore_if_range: serves ranges of a changed file.
        no_length: leaves Content-Length away; the end of the connection ends the file.
        headers: further headers.
    """

    content: bytes
    content_type: str = "application/octet-stream"
    etag: str | None = None
    status: int = 200
    statuses: list[int] = field(default_factory=list)
    retry_after: str | None = None
    drop_after: int | None = None
    n_drops: int = -1
    stall: bool = False
    ignore_range: bool = False
    wrong_range: bool = False
    ignore_if_range: bool = False
    no_length: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class FileServer:
    """Serves `files` (path -> Served, "*" for all others) while its `with` block runs.

    `requests` lists (path, headers) of what came in.
    """

    def __init__(self, files: dict[str, Served] | None = None):
        self.files = files or {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers.items())))
                server._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of every request for path so far."""
        return [headers.get("Range") for asked, headers in self.requests if asked == path]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        served = self.files.get(request.path, self.files.get("*"))
        if served is None:
            request.send_error(404)
            return
        if served.statuses:
            request.send_response(served.statuses.pop(0))
            if served.retry_after is not None:
                request.send_header("Retry-After", served.retry_after)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        status, start, n_all = served.status, 0, len(served.content)
        asked = request.headers.get("Range")
        if_range = request.headers.get("If-Range")
        changed = if_range is not None and if_range != served.etag and not served.ignore_if_range
        if asked is not None and not served.ignore_range and not changed:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
            if served.wrong_range:
                start = 0
        if start >= n_all and status == 206:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{n_all}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(status)
        body = served.content[start:]
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{n_all - 1}/{n_all}")
        if not served.no_length:
            request.send_header("Content-Length", str(len(body)))
        if served.content_type:
            request.send_header("Content-Type", served.content_type)
        if served.etag is not None:
            request.send_header("ETag", served.etag)
        for name, value in served.headers.items():
            request.send_header(name, value)
        request.end_headers()
        if served.drop_after is not None and served.n_drops != 0:
            served.n_drops -= 1
            request.wfile.write(body[: served.drop_after])
            request.wfile.flush()
            if served.stall:
                self.closing.wait()
            return
        request.wfile.write(body)


def make_zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of name -> content."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def publish_record(server: FileServer, record_id: int, files: dict[str, bytes]) -> None:
    """Serves name -> content as a Zenodo record; the API is at `server.url("/api")`."""
    entries = []
    for key, content in files.items():
        path, md5 = f"/api/records/{record_id}/files/{key}/content", hashlib.md5(content).hexdigest()
        server.files[path] = Served(content, etag=f'"md5:{md5}"')
        links = {"self": server.url(path)}
        entries.append({"id": "0000", "key": key, "size": len(content), "checksum": f"md5:{md5}", "links": links})
    answer = {"id": record_id, "metadata": {"title": "a data set"}, "files": entries}
    server.files[f"/api/records/{record_id}"] = Served(json.dumps(answer).encode(), content_type="application/json")
