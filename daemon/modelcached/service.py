"""One method per verb: is this caller allowed? is the request sound? call one flow, take the lease."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from modelcache.protocol import (
    PROTOCOL_VERSION,
    FetchReply,
    HelloReply,
    List_,
    PlanReply,
    Remove,
    Status,
    Verify,
)
from modelcache.protocol import (
    Fetch as FetchParams,
)

from . import __version__
from .config import Config
from .errors import InUse, InvalidRequest, disk_errors
from .fetch import Fetch
from .importing import Importing
from .keeping import Keeping
from .leases import Leases
from .meter import Report
from .model import Caller, Digest, Reply, check_repo, check_revision, is_owner, require_owner
from .policy import Policy
from .rates import Rate
from .repos import Repos
from .selection import Ask
from .tending import Tending
from .trees import Trees
from .upkeep import Known, Upkeep
from .watch import Verb, Watching

MAX_PATTERNS = 1000
log = logging.getLogger(__name__)


class Service:
    def __init__(
        self,
        config: Config,
        fetch: Fetch,
        upkeep: Upkeep,
        trees: Trees,
        repos: Repos,
        leases: Leases,
        keeping: Keeping,
        watching: Watching,
        tending: Tending,
        importing: Importing,
        policy: Policy,
        rates: Mapping[str, Rate],  # by the field that sets it
        statistics: Callable[[int | None], dict[str, Any]],  # as one uid may see them; None: all of it
    ) -> None:
        self._config = config
        self._fetch = fetch
        self._upkeep = upkeep
        self._trees = trees
        self._repos = repos
        self._leases = leases
        self._statistics = statistics
        self._policy = policy
        self._rates = rates
        self.taking = keeping.taking | importing.taking | watching.taking  # the methods that take descriptors
        self._keeping = keeping
        self._watching = watching
        # Those that are told of descriptors.
        self._taking_verbs: dict[str, tuple[type, Verb]] = {**keeping.verbs, **importing.verbs, **watching.verbs}
        self._verbs: dict[str, tuple[type, Callable[[Any, Caller, Report], Awaitable[Reply]]]] = {
            "fetch": (FetchParams, self._do_fetch),
            "plan": (FetchParams, self._do_plan),
            "ls": (List_, self._do_list),
            "rm": (Remove, self._do_remove),
            "verify": (Verify, self._do_verify),
            "status": (Status, self._do_status),
            **tending.verbs,
        }

    @property
    def methods(self) -> Mapping[str, type]:
        return {name: params for name, (params, *_) in (*self._verbs.items(), *self._taking_verbs.items())}

    @property
    def is_busy(self) -> bool:
        return self._keeping.is_busy or self._watching.is_busy

    async def call(self, method: str, params: Any, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        with disk_errors(f"serving {method}"):
            if method in self._taking_verbs:
                return await self._taking_verbs[method][1](params, caller, report, descriptors)
            return await self._verbs[method][1](params, caller, report)

    def reload(self, config: Config) -> None:
        """Takes over what can be changed while the daemon runs; nothing that is under way is dropped."""
        self._config = config
        self._policy.set(config.allowed_repos, config.denied_repos)
        for field, rate in self._rates.items():
            rate.set(getattr(config, field))

    def hello(self) -> HelloReply:
        return HelloReply(
            PROTOCOL_VERSION, __version__, str(self._config.root), self._config.hub_endpoint, self._config.private, os.getpid()
        )

    def attach(self, connect: Callable[[], socket.socket]) -> None:
        self._watching.connect = connect

    async def _do_fetch(self, params: FetchParams, caller: Caller, report: Report) -> Reply:
        start = time.monotonic()
        warnings: list[str] = []
        ask = self._ask(params)
        while True:
            got = await self._fetch.get(ask, report, warnings.append)
            name, tree = got.shown
            view = self._trees.view(name)
            # No await from here on: nothing can take the view away before the lease is held (I2).
            try:
                found = os.stat(view)
                self._trees.touch(name)
            except FileNotFoundError:
                self._fetch.forget()  # removed, or dropped as damaged, between the fetch and here
                continue
            self._trees.admit(name, caller, got.is_private)
            if got.is_private:
                self._repos.note_admitted(ask.repo, caller.uid)
            descriptors: tuple[int, ...] = () if name in params.held else (self._leases.grant(name, caller, params.purpose),)
            break
        try:
            if params.listing:
                descriptors += (self._repos.open_listing(ask.repo, got.commit),)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        reply = FetchReply(
            path=str(view),
            device=found.st_dev,
            inode=found.st_ino,
            tree=name,
            commit=got.commit,
            files=len(tree.files),
            size_bytes=tree.size,
            hub_bytes=got.hub_bytes,
            seconds=round(time.monotonic() - start, 6),
            leased=name not in params.held,
            warnings=warnings,
            private=got.is_private,
            store_bytes=got.store_bytes,
        )
        if reply.leased:
            self._policy.granted(ask.repo, got.commit)
        is_news = reply.leased or reply.hub_bytes + reply.store_bytes > 0  # a task that asks again and again says so once
        log.log(
            logging.INFO if is_news else logging.DEBUG,
            "fetch",
            extra={
                "repo": str(ask.repo),
                "commit": got.commit,
                "files": reply.files,
                "bytes": reply.size_bytes,
                "hub_bytes": got.hub_bytes,
                "store_bytes": got.store_bytes,
                "seconds": reply.seconds,
                **got.spent,
            },
        )
        return Reply(reply, descriptors)

    async def _do_plan(self, params: FetchParams, caller: Caller, report: Report) -> Reply:
        warnings: list[str] = []
        commit, files = await self._fetch.plan(self._ask(params), warnings.append)
        return Reply(PlanReply(commit, None, [[file.path, file.size, is_here] for file, is_here in files]))

    async def _do_list(self, params: List_, caller: Caller, report: Report) -> Reply:
        known = [self._as_seen(caller, each) for each in await self._upkeep.known(params.repo_id)]
        return Reply({"repos": [entry._asdict() for entry in await self._upkeep.entries(known)]})

    async def _do_remove(self, params: Remove, caller: Caller, report: Report) -> Reply:
        require_owner(caller, "remove repos")
        repo = check_repo(self._config.endpoint(params.endpoint), params.repo_type, params.repo_id)
        if self._fetch.is_running(repo):
            raise InUse(f"{repo} is being fetched", "wait until that is done, then remove it again")
        self._fetch.forget()
        try:
            return Reply(await self._upkeep.remove(repo, params.revision, lambda: self._fetch.is_running(repo)))
        finally:
            self._fetch.forget()

    async def _do_verify(self, params: Verify, caller: Caller, report: Report) -> Reply:
        require_owner(caller, "verify the cache")
        repo = None if params.repo_id is None else check_repo(self._config.hub_endpoint, params.repo_type, params.repo_id)
        reply = await self._upkeep.verify(repo, report)
        for digest in reply.damaged:
            self._fetch.note_damaged(Digest(digest))
        return Reply(reply)

    async def _do_status(self, params: Status, caller: Caller, report: Report) -> Reply:
        return Reply(self._statistics(None if is_owner(caller) else caller.uid))

    def _ask(self, params: FetchParams) -> Ask:
        repo = check_repo(self._config.endpoint(params.endpoint), params.repo_type, params.repo_id)
        self._policy.check(repo)
        for patterns in (params.allow_patterns, params.ignore_patterns):
            if patterns is not None and len(patterns) > MAX_PATTERNS:
                raise InvalidRequest(
                    f"{len(patterns)} patterns are too many", f"at most {MAX_PATTERNS}: ask for more files and use the ones you need"
                )
        return Ask(
            repo=repo,
            revision=check_revision(params.revision),
            allow=None if params.allow_patterns is None else tuple(params.allow_patterns),
            ignore=None if params.ignore_patterns is None else tuple(params.ignore_patterns),
            filename=params.filename,
            token=params.token or None,
            force=params.force_download,
            local=params.local_files_only or self._config.offline,
        )

    def _as_seen(self, caller: Caller, known: Known) -> Known:
        """Listings show others' private repos to nobody (I8): not by a tree that looks the same in another repo either."""
        if known.visibility.is_public or is_owner(caller):
            return known
        may_know = self._repos.may_know(known.repo, caller)
        return known._replace(shown={name: how for name, how in known.shown.items() if may_know and self._trees.may_enter(name, caller)})
