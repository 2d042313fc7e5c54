"""A hub of data sets on this machine: a folder for each, served as the clients of `datasets` ask for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, what: Any, status: int = 200) -> None:
        code = {} if status == 200 else {"X_Error_Code": "RepoNotFound"}
        self._send(json.dumps(what).encode(), status, Content_Type="application/json", **code)

    def _files(self, folder: Path) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    def _tree(self, folder: Path, inside: str, deep: bool) -> list[dict[str, Any]]:
        below = [f for f in self._files(folder) if f["path"].startswith(f"{inside}/" if inside else "")]
        if deep:
            return below
        depth = len(Path(inside).parts) + 1
        folders = {Path(*Path(f["path"]).parts[:depth]).as_posix() for f in below if len(Path(f["path"]).parts) > depth}
        return [
            *({"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)),
            *(f for f in below if len(Path(f["path"]).parts) == depth),
        ]

    def _serve(self, body: bytes) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.asked.append(f"{self.command} {'/'.join(parts)}")
        rest = parts[1:] if parts[0] == "api" else parts
        folder = self.root.joinpath(*rest[1:3])
        if rest[0] != "datasets" or len(rest) < 3 or not folder.is_dir():
            self._json({"error": "Repository not found"}, 404)
        elif parts[0] == "api" and rest[3:4] in ([], ["revision"]):
            files = [{"rfilename": file["path"]} for file in self._files(folder)]
            told = {"id": "/".join(rest[1:3]), "sha": COMMIT, "siblings": files, "private": False, "gated": False}
            self._json({**told, "disabled": False, "tags": [], "downloads": 0, "likes": 0})
        elif parts[0] == "api" and rest[3] == "tree":
            inside = "/".join(rest[5:])
            self._json(self._tree(folder, inside, "recursive=True" in self.path))
        elif parts[0] == "api" and rest[3] == "paths-info":
            wanted = (
                json.loads(body)["paths"] if body[:1] == b"{" else [unquote(p[6:]) for p in body.decode().split("&")]
            )
            self._json([f for f in self._files(folder) if f["path"] in wanted])
        elif rest[3] == "resolve" and (path := folder.joinpath(*rest[5:])).is_file():
            self._file(path)
        else:
            self._send(b"", 404, X_Error_Code="EntryNotFound")

    def _file(self, path: Path) -> None:
        body = path.read_bytes()
        tag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            self._send(body, **headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(body) - 1), len(body) - 1)
        self._send(body[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(body)}", **headers)

    def do_GET(self) -> None:
        self._serve(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `root/OWNER/NAME` for each data set; gives the hub's address, and a list that takes down what was asked."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
