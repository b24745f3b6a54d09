"""Policy: which repos this daemon hands out at all, by name. What the hub thinks of a caller comes on top of it (I8).

A repo is named `org/name`, `datasets/org/name` or `spaces/org/name`; case does not count, for the hub ignores it. `denied_repos` wins
over `allowed_repos`, which allows everything while it is empty. With rules, every grant and refusal is a line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from .errors import NotPermitted
from .model import Commit, Repo

log = logging.getLogger(__name__)


class Policy:
    """The rules may change while the daemon runs: what was handed out stays with its holder."""

    def __init__(self, allowed: Sequence[str], denied: Sequence[str]) -> None:
        self.set(allowed, denied)

    def set(self, allowed: Sequence[str], denied: Sequence[str]) -> None:
        self._allowed, self._denied = tuple(allowed), tuple(denied)

    def check(self, repo: Repo) -> None:
        """NotPermitted tells which rule stands against it; whether there is such a repo plays no part."""
        name = str(repo).lower()
        denied = _matching(name, self._denied)
        if denied is None and (not self._allowed or _matching(name, self._allowed) is not None):
            return
        rule = "it matches none of allowed_repos" if denied is None else f"it matches {denied!r} of denied_repos"
        log.warning("refused", extra={"repo": str(repo), "rule": rule})
        hint = "ask whoever runs the daemon; the rules are in its configuration"
        raise NotPermitted(f"this node's daemon does not hand out {repo}: {rule}", hint)

    def granted(self, repo: Repo, commit: Commit) -> None:
        if self._allowed or self._denied:
            log.info("granted", extra={"repo": str(repo), "commit": commit})


def _matching(name: str, globs: Iterable[str]) -> str | None:
    return next((glob for glob in globs if fnmatchcase(name, glob.lower())), None)
