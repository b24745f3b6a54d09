"""The hub's own URL space: what each address means and what is said there.

Invariants: nothing is sent that the real hub does not send (and no xet headers: plain HTTP is what is tested); access is decided before
existence is told; content in LFS is never sent by this host, only its signed address on the second one.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from aiohttp import web

from .content import Blob
from .lfs import Signer
from .log import Request
from .repos import Catalogue, Commit, Moved, Refused, Repo
from .wire import Answer

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
VERBS = ("revision", "tree", "auth-check", "refs", "commits", "paths-info")
EXPANDED_PAGE = 20  # with expand=True a page has so many times fewer rows


@dataclass(frozen=True)
class Settings:
    page_size: int = 1000
    url_seconds: float = 3600.0  # how long a signed address is good
    resolve_cache: bool = False  # send small files from /api/resolve-cache/..., one relative redirect away, as the real hub does today


@dataclass
class _Ask:
    """An address, taken apart."""

    verb: str
    repo_type: str
    repo_id: str
    rest: list[str]  # decoded segments after the verb
    query: dict[str, list[str]]
    token: str | None

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


class Api:
    """Answers for a catalogue. `lfs_url` is where the second host listens."""

    def __init__(self, catalogue: Catalogue, signer: Signer, settings: Settings, lfs_url: str) -> None:
        self._catalogue = catalogue
        self._signer = signer
        self._settings = settings
        self._lfs_url = lfs_url

    async def __call__(self, request: web.BaseRequest, record: Request) -> Answer:
        try:
            ask = self._parse(request, record)
            self._catalogue.check_token(ask.token)
            if ask.verb == "whoami":
                return self._whoami(ask)
            repo = self._catalogue.open(ask.repo_type, ask.repo_id, ask.token, content=ask.verb in ("resolve", "cache", "auth-check"))
            return await self._answer(request, record, ask, repo)
        except Moved as moved:
            before, _, after = request.raw_path.partition("/" + quote(ask.repo_id))
            return Answer(b"", 307, {"Location": f"{before}/{quote(moved.repo_id)}{after}"})
        except Refused as refused:
            answer = Answer.json({"error": refused.message}, refused.status, X_Error_Message=quote(refused.message, safe=" :'./,()!?-_"))
            if refused.code:
                answer.headers["X-Error-Code"] = refused.code
            if refused.commit:
                answer.headers["X-Repo-Commit"] = refused.commit
            if refused.status == 401:
                answer.headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
            return answer

    def _parse(self, request: web.BaseRequest, record: Request) -> _Ask:
        parts = [unquote(part) for part in request.raw_path.partition("?")[0].split("/")[1:]]
        header = request.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        ask = _Ask("", "model", "", [], parse_qs(record.query), token)
        if parts[0] != "api":
            ask.verb = "resolve"
            if parts[0] in ("datasets", "spaces"):
                ask.repo_type = TYPES[parts.pop(0)]
            self._split(ask, parts, ("resolve",))
            ask.rest = _join_ref(ask.rest)
        elif parts[1:2] == ["whoami-v2"]:
            ask.verb = "whoami"
        elif parts[1:2] == ["resolve-cache"] and parts[2] in TYPES:
            ask.verb, ask.repo_type = "cache", TYPES[parts[2]]
            ask.repo_id, ask.rest = "/".join(parts[3:5]), parts[5:]
            if not self._catalogue.has(ask.repo_type, ask.repo_id):
                ask.repo_id, ask.rest = parts[3], parts[4:]
        elif len(parts) > 2 and parts[1] in TYPES:
            ask.repo_type = TYPES[parts[1]]
            self._split(ask, parts[2:], VERBS)
            ask.verb = ask.verb or "info"
            ask.rest = _join_ref(ask.rest)
        else:
            raise Refused(404, None, "Sorry, we can't find the page you are looking for.")
        record.kind = "info" if ask.verb == "revision" else ask.verb
        record.repo = f"{ask.repo_type}/{ask.repo_id}" if ask.repo_id else ""
        if ask.verb in ("resolve", "cache", "tree", "revision", "paths-info"):
            record.revision = ask.rest[0] if ask.rest else "main"
            record.file = "/".join(ask.rest[1:])
        return ask

    @staticmethod
    def _split(ask: _Ask, parts: list[str], verbs: tuple[str, ...]) -> None:
        """`name[/verb/...]` or `org/name[/verb/...]`."""
        length = 1 if len(parts) > 1 and parts[1] in verbs and not (len(parts) > 2 and parts[2] in verbs) else 2
        ask.repo_id = "/".join(parts[:length])
        if len(parts) > length:
            if parts[length] not in verbs:
                raise Refused(404, None, "Sorry, we can't find the page you are looking for.")
            ask.verb, ask.rest = parts[length], parts[length + 1 :]
        elif "resolve" in verbs:
            raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    async def _answer(self, request: web.BaseRequest, record: Request, ask: _Ask, repo: Repo) -> Answer:
        if ask.verb == "auth-check":
            return Answer(b"", 200)
        if ask.verb == "refs":
            return Answer.json(_refs(repo, ask.flag("include_prs")))
        commit = repo.find(ask.rest[0] if ask.rest else "main")
        path = "/".join(ask.rest[1:])
        if ask.verb in ("resolve", "cache"):
            return self._resolve(record, ask, repo, commit, path)
        if ask.verb == "tree":
            return self._tree(request, ask, commit, path)
        if ask.verb == "commits":
            return Answer.json(_commits(commit))
        if ask.verb == "paths-info":
            return Answer.json(_paths_info(commit, parse_qs((await request.content.read()).decode(), keep_blank_values=True)))
        return Answer.json(_info(repo, commit, ask))

    def _resolve(self, record: Request, ask: _Ask, repo: Repo, commit: Commit, path: str) -> Answer:
        blob = commit.find(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", commit.sha)
        record.oid = blob.sha256 or blob.oid
        filename = path.rpartition("/")[2]
        headers = {
            "X-Repo-Commit": commit.sha,
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(filename)}; filename=\"{quote(filename)}\";",
            "Access-Control-Expose-Headers": "X-Repo-Commit,X-Error-Code,X-Error-Message,ETag,Link,Accept-Ranges,Content-Range",
        }
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is not None:
            signed = self._signer.sign(record.repo, blob.sha256, path, self._settings.url_seconds)
            return Answer(b"", 302, {**headers, **linked, "ETag": f'"{blob.oid}"', "Location": self._lfs_url + signed})
        if self._settings.resolve_cache and ask.verb == "resolve":
            place = f"/api/resolve-cache/{repo.repo_type}s/{quote(repo.repo_id)}/{commit.sha}/{quote(path)}"
            return Answer(b"", 307, {**headers, **linked, "Location": f"{place}?{urlencode({'etag': linked['X-Linked-ETag']})}"})
        return Answer(blob.body, headers={**headers, "Content-Type": "text/plain; charset=utf-8"}, etag=blob.oid)

    def _tree(self, request: web.BaseRequest, ask: _Ask, commit: Commit, path: str) -> Answer:
        rows = commit.listing(path.strip("/"), ask.flag("recursive"))
        if rows is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {ask.rest[0]}", commit.sha)
        expand = ask.flag("expand")
        size = max(1, self._settings.page_size // (EXPANDED_PAGE if expand else 1))
        size = min(size, int(ask.query.get("limit", [str(size)])[0]))
        cursor = ask.query.get("cursor")
        start = int(json.loads(base64.urlsafe_b64decode(cursor[0]))["from"]) if cursor else 0
        page = rows[start : start + size]
        answer = Answer.json([{**row, **_last_commit(commit), **_scan(row)} for row in page] if expand else page)
        if start + size < len(rows):
            query = {name: values[0] for name, values in ask.query.items()}
            query["cursor"] = base64.urlsafe_b64encode(json.dumps({"from": start + size}).encode()).decode()
            target = request.raw_path.partition("?")[0]
            answer.headers["Link"] = f'<http://{request.host}{target}?{urlencode(query)}>; rel="next"'
        return answer

    def _whoami(self, ask: _Ask) -> Answer:
        if ask.token is None:
            raise Refused(401, None, "Invalid username or password.")
        return Answer.json({"type": "user", "id": "0", "name": "somebody", "orgs": [], "auth": {"type": "access_token"}})


def _join_ref(rest: list[str]) -> list[str]:
    """`refs/pr/1` is understood when it is not encoded too."""
    return ["/".join(rest[:3]), *rest[3:]] if rest[:1] == ["refs"] and len(rest) > 2 else rest


def _info(repo: Repo, commit: Commit, ask: _Ask) -> dict[str, Any]:
    def sibling(path: str, blob: Blob) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": path}
        if ask.flag("blobs"):
            row.update(size=blob.size, blobId=blob.oid)
            if blob.sha256 is not None:
                row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        return row

    identity = {"_id": commit.sha[:24], "id": repo.repo_id}
    info: dict[str, Any] = {
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "author": repo.repo_id.partition("/")[0] if "/" in repo.repo_id else None,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": commit.date,
        "siblings": [sibling(path, blob) for path, blob in commit.entries],
        "usedStorage": sum(blob.size for _, blob in commit.entries),
    }
    if repo.repo_type == "model":
        info["modelId"] = repo.repo_id
    wanted = ask.query.get("expand", []) + ask.query.get("expand[]", [])
    return {**identity, **({name: info[name] for name in wanted if name in info} if wanted else info)}


def _refs(repo: Repo, pulls: bool) -> dict[str, Any]:
    def rows(names: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": commit.sha} for name, commit in names.items()]

    made: dict[str, Any] = {"branches": rows(repo.branches, "refs/heads/"), "converts": [], "tags": rows(repo.tags, "refs/tags/")}
    return {**made, "pullRequests": rows(repo.pulls, "")} if pulls else made


def _commits(commit: Commit) -> list[dict[str, Any]]:
    made = []
    at: Commit | None = commit
    while at is not None:
        made.append({"id": at.sha, "title": at.title, "message": "", "authors": [{"user": "somebody"}], "date": at.date})
        at = at.parent
    return made


def _paths_info(commit: Commit, form: dict[str, list[str]]) -> list[dict[str, Any]]:
    made = []
    for path in form.get("paths", []):
        blob = commit.find(path)
        row = blob.row(path) if blob else {"type": "directory", "oid": commit.sha, "size": 0, "path": path}
        if blob or commit.listing(path, False) is not None:
            made.append({**row, **_last_commit(commit)} if form.get("expand") == ["true"] else row)
    return made


def _last_commit(commit: Commit) -> dict[str, Any]:
    return {"lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}}


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    if row["type"] == "directory":
        return {}
    return {"securityFileStatus": {"status": "safe", "avScan": {"status": "safe"}, "pickleImportScan": None}}
