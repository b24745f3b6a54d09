"""`Hub`: a running hub, in the hands of a test or a benchmark.

Invariants: the hub is a process of its own (kill -9 of the test ends it too), is ended by its pid, and is told what to do on a
port outside its URL space. Only the standard library is used here.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .content import Random, Source
from .log import Request

START_SECONDS = 20.0
END_SECONDS = 5.0

_ROOT = Path(__file__).resolve().parents[2]

Content = Source | str | None
Files = Mapping[str, Any] | Iterable[tuple[str, Content]]  # Any: a Mapping's values do not vary with it in mypy's eyes


class HubError(Exception):
    """The hub did not do what the test asked; the message is its exception."""


class Hub:
    """A running hub. Methods may be called from any thread. Repo types are "model", "dataset", "space"."""

    def __init__(self, processes: list[subprocess.Popen[str]], lines: list[dict[str, str]]) -> None:
        self._processes = processes
        self._controls = {"hub": lines[-1]["control"], "lfs": lines[0]["control"]}  # by host
        self.endpoint = lines[-1]["endpoint"]
        self.lfs_url = lines[-1]["lfs"]
        self.pid = processes[-1].pid

    @classmethod
    def start(
        cls,
        state: Path | str,
        *,
        port: int = 0,
        page_size: int = 1000,
        url_seconds: float = 3600.0,
        rate: float = 0.0,
        resolve_cache: bool = False,
        lfs_process: bool = False,
    ) -> Hub:
        """Starts it. Its folder is `state`/hub, its stderr `state`/hub/stderr. Options: `python -m tests.hub --help`.

        `lfs_process` makes the second host a process of its own, for benchmarks; a fault's `times` is then counted by each of the two.
        """
        folder = Path(state) / "hub"
        folder.mkdir(parents=True, exist_ok=True)
        common = ["--state", str(folder), "--rate", str(rate), "--with-stdin"]
        processes: list[subprocess.Popen[str]] = []
        lines: list[dict[str, str]] = []
        try:
            if lfs_process:
                _launch([*common, "--role", "lfs"], folder, processes, lines)
                common += ["--lfs-url", lines[0]["lfs"]]
            common += ["--port", str(port), "--page-size", str(page_size), "--url-seconds", str(url_seconds)]
            _launch([*common, *(["--resolve-cache"] if resolve_cache else [])], folder, processes, lines)
            return cls(processes, lines)
        except BaseException:
            _end(processes)
            raise

    def close(self) -> None:
        _end(self._processes)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commit(
        self,
        repo_id: str,
        files: Files,
        *,
        repo_type: str = "model",
        branch: str = "main",
        private: bool | None = None,
        gated: bool | None = None,
        tokens: list[str] | None = None,
        lfs: list[str] | None = None,
        message: str = "A commit",
        replace: bool = False,
        hostile: bool = False,
    ) -> str:
        """Adds files to what the branch has (`replace`: instead of it; None: removes the file) and returns the commit's hash.

        A new branch, or "refs/pr/1", starts from main. Content is bytes, str, Random, or the Path of a file that is copied.
        `lfs` are the patterns of large files (default *.safetensors *.bin *.pt and whatever has 1 MiB). What is None of the access
        settings stays as it was. `hostile` lists the (path, content) pairs as they are: "..", absolute, NUL, twice, file and folder.
        """
        pairs = files.items() if isinstance(files, Mapping) else files
        return self._name(
            "commit",
            repo_id=repo_id,
            repo_type=repo_type,
            files=[(path, _encode(source)) for path, source in pairs],
            branch=branch,
            lfs=lfs,
            message=message,
            replace=replace,
            hostile=hostile,
            private=private,
            gated=gated,
            tokens=tokens,
        )

    def commit_many(
        self,
        repo_id: str,
        count: int,
        size: int = 64,
        *,
        repo_type: str = "model",
        equal: bool = False,
        lfs: bool = False,
        folder: int = 1000,
    ) -> str:
        """`count` files with content many_content(repo_id, i, size) at many_path(i, folder); `equal`: all with that of file 0."""
        return self._name(
            "commit_many",
            repo_id=repo_id,
            repo_type=repo_type,
            count=count,
            size=size,
            equal=equal,
            lfs=lfs,
            folder=folder,
            branch="main",
            private=None,
            gated=None,
            tokens=None,
        )

    def tag(self, repo_id: str, tag: str, revision: str = "main", *, repo_type: str = "model") -> str:
        return self._name("tag", repo_id=repo_id, repo_type=repo_type, tag=tag, revision=revision)

    def access(
        self,
        repo_id: str,
        *,
        repo_type: str = "model",
        private: bool | None = None,
        gated: bool | None = None,
        tokens: list[str] | None = None,
    ) -> None:
        """Changes who may have it, now."""
        self._ask("access", repo_id=repo_id, repo_type=repo_type, private=private, gated=gated, tokens=tokens)

    def delete(self, repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> None:
        """Deletes the repo, or one branch, tag or pull request of it."""
        self._ask("delete", repo_id=repo_id, repo_type=repo_type, revision=revision)

    def rename(self, old: str, new: str, *, repo_type: str = "model") -> None:
        self._ask("rename", old=old, new=new, repo_type=repo_type)

    def add_token(self, token: str) -> None:
        """A token the hub accepts, though no repo does. (The tokens of repos are added by themselves.)"""
        self._ask("add_token", token=token)

    def revoke_token(self, token: str) -> None:
        self._ask("revoke_token", token=token)

    def misbehave(self, kind: str, match: str | None = None, times: int | None = None, **details: Any) -> None:
        """Switches a fault on, until calm() or for `times` requests. Kinds and details: `Fault` in faults.py.

        "429", "ratelimit" (retry_after), "5xx" (status), "expired" (403 of the LFS host), "hang": instead of an answer.
        "reset", "short", "stall", "wrong": `after` so many bytes of a body. "no_range"; "gzip"; "slow" (rate, per_connection).
        "down": connections are refused, open ones reset (match: "hub" or "lfs", else both).
        `match` is a regular expression, searched in "KIND METHOD PATH FILE".
        """
        self._ask_all("misbehave", kind=kind, match=match, times=times, **details)

    def calm(self) -> None:
        """Ends all misbehaviour; stalled connections are reset."""
        self._ask_all("calm")

    def requests(self, kind: str | None = None, match: str | None = None) -> list[Request]:
        """What came since the last reset_log(), in order of arrival. Requests that are still answered have seconds=None."""
        rows = [Request(**row) for value in self._ask_all("requests", kind=kind, match=match) for row in value]
        return sorted(rows, key=lambda row: row.started)

    def bytes_sent(self, what: str | None = None) -> int:
        """Body bytes that left the hub for one content id, or path; without either for all files, not listings."""
        return sum(self._ask_all("bytes_sent", what=what))

    def wait(
        self,
        *,
        requests: int = 0,
        bytes_sent: int = 0,
        kind: str | None = None,
        match: str | None = None,
        over: bool = False,
        host: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        """Returns when so many requests of this kind came (`over`: are answered) and so many bytes went out for them. No polling."""
        host = host or ("lfs" if kind == "lfs" else "hub")
        condition = {"requests": requests, "bytes_sent": bytes_sent, "kind": kind, "match": match, "over": over}
        _tell(self._controls[host], "wait", {"host": host, "timeout": timeout, **condition}, timeout + 5)

    def reset_log(self) -> None:
        self._ask_all("reset_log")

    def _ask(self, verb: str, **arguments: Any) -> Any:
        return _tell(self._controls["hub"], verb, arguments)

    def _name(self, verb: str, **arguments: Any) -> str:
        return str(self._ask(verb, **arguments))

    def _ask_all(self, verb: str, **arguments: Any) -> list[Any]:
        return [_tell(control, verb, arguments) for control in dict.fromkeys(self._controls.values())]

    def __repr__(self) -> str:
        return f"<Hub {self.endpoint} pid {self.pid}>"


def _tell(control: str, verb: str, arguments: dict[str, Any], timeout: float = 600.0) -> Any:
    connection = http.client.HTTPConnection(urlsplit(control).netloc, timeout=timeout)
    try:
        connection.request("POST", f"/{verb}", json.dumps(arguments))
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if "error" in answer:
        raise HubError(f"{verb}: {answer['error']}")
    return answer["value"]


def _launch(arguments: list[str], folder: Path, processes: list[subprocess.Popen[str]], lines: list[dict[str, str]]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(folder / "stderr", "a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    processes.append(process)
    assert process.stdout is not None
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        raise HubError(f"the hub did not start: {(folder / 'stderr').read_text()[-2000:]}")
    lines.append(json.loads(line))


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _encode(source: Source | str | None) -> dict[str, Any] | None:
    if source is None:
        return None
    if isinstance(source, Random):
        return {"random": [source.seed, source.size]}
    if isinstance(source, Path):
        return {"file": str(source.resolve())}
    content = source.encode() if isinstance(source, str) else source
    return {"base64": base64.b64encode(content).decode()}
