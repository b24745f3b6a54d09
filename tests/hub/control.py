"""What tests tell the hub: one POST per verb with a JSON object, on a port of its own, so that the hub's URL space holds nothing of ours.

Invariant: a verb's name, arguments and defaults stand in `Hub` (handle.py), its meaning here; an exception goes back as its text and the
hub lives on.
"""

from __future__ import annotations

import asyncio
import base64
import fnmatch
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from .content import Blob, Random, Shelf, Source, many_content, many_path
from .faults import Fault, Faults
from .repos import Catalogue, Repo
from .wire import Host

LFS_PATTERNS = ["*.safetensors", "*.bin", "*.pt"]
LFS_BYTES = 1 << 20  # from here on a file is in LFS whatever its name


class Control:
    """The verbs. `hosts` are those of this process."""

    def __init__(self, catalogue: Catalogue, shelf: Shelf, faults: Faults, hosts: list[Host]) -> None:
        self._catalogue, self._shelf, self._faults, self._hosts = catalogue, shelf, faults, hosts
        self._verbs = {name[5:]: getattr(self, name) for name in dir(self) if name.startswith("verb_")}

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        try:
            verb = self._verbs[request.path.strip("/")]
            value = await verb(**json.loads(await request.content.read() or b"{}"))
            return web.json_response({"value": value})
        except Exception as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

    async def verb_commit(
        self,
        repo_id: str,
        repo_type: str,
        files: list[tuple[str, dict[str, Any] | None]],
        branch: str,
        lfs: list[str] | None,
        message: str,
        replace: bool,
        hostile: bool,
        **access: Any,
    ) -> str:
        changes = [(path, await asyncio.to_thread(self._put, path, source, lfs) if source else None) for path, source in files]
        repo = self._access(repo_type, repo_id, **access)
        if hostile:
            return repo.publish([(path, blob) for path, blob in changes if blob], branch, message, hostile=True).sha
        parent = repo.branches.get(branch) or repo.pulls.get(branch) or repo.branches.get("main")
        entries = dict(parent.entries) if parent and not replace else {}
        for path, blob in changes:
            _check(path)
            if blob is None:
                del entries[path]
            else:
                entries[path] = blob
        return repo.publish(sorted(entries.items()), branch, message, hostile=False).sha

    async def verb_commit_many(
        self, repo_id: str, repo_type: str, count: int, size: int, equal: bool, lfs: bool, folder: int, branch: str, **access: Any
    ) -> str:
        def make() -> list[tuple[str, Blob]]:
            one = self._shelf.put(many_content(repo_id, 0, size), lfs) if equal else None
            return [(many_path(i, folder), one or self._shelf.put(many_content(repo_id, i, size), lfs)) for i in range(count)]

        entries = await asyncio.to_thread(make)
        return self._access(repo_type, repo_id, **access).publish(entries, branch, f"{count} files", hostile=False).sha

    async def verb_tag(self, repo_id: str, repo_type: str, tag: str, revision: str) -> str:
        repo = self._catalogue.get(repo_type, repo_id)
        repo.tags[tag] = repo.find(revision)
        return repo.tags[tag].sha

    async def verb_access(self, repo_id: str, repo_type: str, **access: Any) -> None:
        self._catalogue.get(repo_type, repo_id)
        self._access(repo_type, repo_id, **access)

    async def verb_delete(self, repo_id: str, repo_type: str, revision: str | None) -> None:
        if revision is None:
            self._catalogue.delete(repo_type, repo_id)
            return
        repo = self._catalogue.get(repo_type, repo_id)
        for names in (repo.branches, repo.tags, repo.pulls):
            if names.pop(revision, None) is not None:
                return
        raise KeyError(revision)

    async def verb_rename(self, old: str, new: str, repo_type: str) -> None:
        self._catalogue.rename(repo_type, old, new)

    async def verb_add_token(self, token: str) -> None:
        self._catalogue.users.add(token)

    async def verb_revoke_token(self, token: str) -> None:
        self._catalogue.users.discard(token)

    async def verb_misbehave(self, **fault: Any) -> None:
        made = Fault(**fault)
        if made.kind != "down":
            self._faults.add(made)
            return
        for host in self._hosts:
            if made.match is None or made.match == host.log.host:
                host.down()

    async def verb_calm(self) -> None:
        self._faults.calm()
        for host in self._hosts:
            await host.up()

    async def verb_requests(self, kind: str | None, match: str | None) -> list[dict[str, Any]]:
        return [row for host in self._hosts for row in host.log.to_json(kind, match)]

    async def verb_bytes_sent(self, what: str | None) -> int:
        rows = (row for host in self._hosts for row in host.log.requests)
        return sum(row.bytes_sent for row in rows if (row.is_about(what) if what else row.kind in ("resolve", "cache", "lfs")))

    async def verb_wait(self, host: str, timeout: float, **condition: Any) -> None:
        (log,) = (one.log for one in self._hosts if one.log.host == host)
        try:
            await asyncio.wait_for(log.wait(**condition), timeout)
        except TimeoutError:
            seen = log.select(condition["kind"], condition["match"])
            raise TimeoutError(f"{timeout} s: {len(seen)} requests, {sum(one.bytes_sent for one in seen)} bytes") from None

    async def verb_reset_log(self) -> None:
        for host in self._hosts:
            host.log.reset()

    def _access(self, repo_type: str, repo_id: str, private: bool | None, gated: bool | None, tokens: list[str] | None) -> Repo:
        repo = self._catalogue.create(repo_type, repo_id)
        repo.private = repo.private if private is None else private
        repo.gated = repo.gated if gated is None else gated
        if tokens is not None:
            repo.tokens = set(tokens)
            self._catalogue.users |= repo.tokens
        return repo

    def _put(self, path: str, source: dict[str, Any], lfs: list[str] | None) -> Blob:
        content: Source
        if "random" in source:
            content = Random(*source["random"])
        else:
            content = Path(source["file"]) if "file" in source else base64.b64decode(source["base64"])
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        name = path.rpartition("/")[2]
        is_lfs = any(fnmatch.fnmatchcase(name, pattern) or path == pattern for pattern in (LFS_PATTERNS if lfs is None else lfs))
        return self._shelf.put(content, is_lfs or (lfs is None and size >= LFS_BYTES))


def _check(path: str) -> None:
    if not path or path != "/".join(part for part in path.split("/") if part not in ("", ".", "..")) or "\0" in path:
        raise ValueError(f"{path!r} can't be in a git tree; say hostile=True if that is the point")
