"""A small hub on 127.0.0.1 that speaks enough of the Hugging Face hub's protocol, and a client process to ask it.

`huggingface_hub` reads `HF_ENDPOINT` and `HF_HUB_OFFLINE` when it is imported, so the calls under test run in a process
of their own: `Client` starts this module as a program, which answers one JSON line with another.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from opt_common import hub
from opt_common.errors import OPTError


@dataclasses.dataclass(frozen=True)
class Repository:
    """Files by name by revision; `token` is what a request must carry, `gated` refuses files to everyone."""

    revisions: Mapping[str, Mapping[str, bytes]]
    token: str | None = None
    gated: bool = False

    def find(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        """Commit and files of a branch or of a commit."""
        for name, files in self.revisions.items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that the hub has got."""

    method: str
    path: str
    authorization: str | None
    range: str | None


class StandInHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: the log of what it was asked.
        sent: bytes of all answers.
        broken: whether it answers every request with an error.
        failing: names of files that it answers with an error.
        cut: name of a file -> after how many bytes the connection ends, the next time that it is sent.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[Request] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was asked, and be sound again."""
        self.requests.clear()
        self.sent = 0
        self.broken = False
        self.failing: set[str] = set()
        self.cut: dict[str, int] = {}

    @property
    def url(self) -> str:
        """The address to give as `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """Names of the files whose contents were sent since `requests` was last cleared, sorted."""
        paths = [request.path for request in self.requests if request.method == "GET" and "/resolve/" in request.path]
        return sorted(path.rpartition("/")[2] for path in paths)

    @classmethod
    @contextmanager
    def running(cls, repositories: Mapping[str, Repository]) -> Iterator[Self]:
        """Serve in a thread until the block ends."""
        with cls(repositories) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:  # noqa: PLR0911  # one return an answer
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(
            Request(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
        )
        if self.server.broken:
            return self._send(503, b"")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        if match is None:
            match = re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/(.+)/([^/]+)", path)
        if match is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        repository = self.server.repositories.get(match[1])
        allowed = repository and repository.token in (None, (self.headers.get("Authorization") or "")[len("Bearer ") :])
        if repository is None or not allowed:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        found = repository.find(match[3])
        if found is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if match[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._send_json({"id": match[1], "sha": commit, "siblings": siblings})
        if match[2] == "tree":
            return self._send_json([_tree_entry(name, content) for name, content in files.items()])
        if repository.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if match[4] not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if match[4] in self.server.failing and self.command == "GET":
            return self._send(500, b"")
        return self._send_file(match[4], files[match[4]], commit)

    def _send_file(self, name: str, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self._send(200, content, headers, self.server.cut.pop(name, None) if self.command == "GET" else None)
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, content[start : end + 1], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.server.sent += len(body[:cut])
        self.close_connection |= cut is not None


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call of `resolve` came to: a directory or an error's text, and the warnings on the way."""

    directory: Path | None
    error: str | None
    warnings: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Names of the files in the directory, sorted."""
        assert self.directory is not None, self.error
        return sorted(path.name for path in self.directory.iterdir())


class Client:
    """A process that calls `opt_common.hub.resolve` under an environment of its own."""

    def __init__(self, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            env={**inherited, **quiet, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def resolve(self, *arguments: str, **options: object) -> Answer:
        """Call `hub.resolve` in the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, options]) + "\n")
        self._process.stdin.flush()
        directory, error, texts = json.loads(self._process.stdout.readline())
        return Answer(None if directory is None else Path(directory), error, tuple(texts))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _answer_calls() -> None:
    for line in sys.stdin:
        arguments, options = json.loads(line)
        directory, problem = None, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                directory = str(hub.resolve(*arguments, **options))
            except OPTError as error:
                problem = f"{type(error).__name__}: {error}"
        texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
        print(json.dumps([directory, problem, texts]), flush=True)


if __name__ == "__main__":
    _answer_calls()
