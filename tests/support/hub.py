"""The Hugging Face hub as its client sees it: a cache laid out as the client lays it, and a server that answers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, repository: str, files: Mapping[str, bytes], kind: str = "models", commit: str = COMMIT) -> Path:
    """A snapshot in the cache of `home`: blobs, links to them, and the branch main. Returns the snapshot."""
    root = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    snapshot = root / "snapshots" / commit
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


@contextmanager
def served(
    repositories: Mapping[str, Mapping[str, bytes]], gated: tuple[str, ...] = (), instead: bytes | None = None
) -> Iterator[str]:
    """The address of a hub with these files by repository, as `models/owner/name`; of `gated` ones it gives none.

    Args:
        instead: what a proxy answers to whatever is asked.
    """

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if instead is not None:
                return self.send(200, instead)
            for repository, files in repositories.items():
                place = repository.removeprefix("models/")
                if path in (f"api/{repository}", *(f"api/{repository}/revision/{one}" for one in ("main", COMMIT))):
                    siblings = [{"rfilename": name} for name in files]
                    body = json.dumps({"id": place.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings})
                    return self.send(200, body.encode())
                if path.startswith(f"api/{repository}/tree/"):
                    tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                    return self.send(200, json.dumps(tree).encode())
                if path.startswith(f"api/{repository}/revision/"):
                    return self.send(404, b"{}", "RevisionNotFound")
                for name, content in files.items():
                    if path in (f"{place}/resolve/{revision}/{name}" for revision in ("main", COMMIT)):
                        if repository in gated:
                            return self.send(401, b"{}", "GatedRepo")
                        return self.send(200, content)
            self.send(401 if "unknown" in path else 404, b"{}", "RepoNotFound")

        def send(self, status: int, body: bytes, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
