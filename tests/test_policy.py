"""Policy: which repos a daemon hands out, what a caller and the log are told, and a change while the daemon runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelcached.errors import NotPermitted
from modelcached.model import Repo
from modelcached.policy import Policy

from .clients import Client
from .configured import start_configured
from .daemon import Daemon
from .hub import Hub


@pytest.mark.parametrize(
    ("allowed", "denied", "repo", "is_allowed"),
    [
        ((), (), "org/model", True),
        (("org/*",), (), "org/model", True),
        (("org/*",), (), "other/model", False),
        (("org/*",), ("org/secret*",), "org/secret-2", False),
        (("org/*",), ("org/secret*",), "org/model", True),
        ((), ("*",), "org/model", False),
        (("gpt2",), (), "gpt2", True),
        (("gpt2",), (), "gpt2-large", False),
        (("Org/*",), (), "oRG/model", True),  # the hub answers to any case
        ((), ("org/model",), "ORG/Model", False),
        (("org/[ab]*",), (), "org/beta", True),
        (("org/[ab]*",), (), "org/gamma", False),
    ],
)
def test_rules(allowed: tuple[str, ...], denied: tuple[str, ...], repo: str, is_allowed: bool) -> None:
    policy = Policy(allowed, denied)
    if is_allowed:
        policy.check(Repo("https://hub", "model", repo))
    else:
        with pytest.raises(NotPermitted):
            policy.check(Repo("https://hub", "model", repo))


def test_a_type_is_a_part_of_the_name() -> None:
    policy = Policy(("org/*", "datasets/org/*"), ("spaces/*",))
    policy.check(Repo("https://hub", "dataset", "org/data"))
    for kind, name in (("dataset", "other/data"), ("space", "org/app")):
        with pytest.raises(NotPermitted, match=name):
            policy.check(Repo("https://hub", kind, name))


def test_what_is_denied_is_not_even_asked_for(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/model", {"a": b"a"})
    hub.commit("org/secret", {"a": b"a"})
    rules = {"allowed_repos": "org/*,datasets/org/*", "denied_repos": "org/secret"}
    with Daemon.start(tmp_path / "root", hub, uid=None, **rules) as daemon, Client.of(daemon) as task:
        task.download("org/model")
        hub.reset_log()
        for name in ("org/secret", "org/nothing-of-that-name", "other/model"):
            is_denied = name != "org/nothing-of-that-name"
            refused = task.refused("snapshot_download", repo_id=name)
            assert refused.error is not None and ("NotPermittedError" in refused.error) is is_denied
            assert not is_denied or name in str(refused.message)
        assert task.refused("fetch", repo_id="other/model").error
        assert not hub.requests(match="secret") and not hub.requests(match="other")
        lines = daemon.log.splitlines()
        (granted,) = [line for line in lines if "event=granted" in line]
        refusals = [line for line in lines if "event=refused" in line]
        assert "repo=org/model" in granted and "commit=" in granted
        assert len(refusals) == 3
        for line in (granted, *refusals):
            assert f"uid={os.getuid()} pid={task.pid}" in line
        assert "denied_repos" in refusals[0] and "allowed_repos" in refusals[1]


def test_without_rules_no_line_is_written(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/model", {"a": b"a"})
    with Daemon.start(tmp_path / "root", hub) as daemon, Client.of(daemon) as task:
        task.download("org/model")
        assert "event=granted" not in daemon.log


def test_rules_change_while_the_daemon_runs(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/model", {"a": b"a"})
    with start_configured(tmp_path / "c.toml", "", tmp_path / "root", hub) as daemon, Client.of(daemon) as task:
        task.download("org/model")
        assert "changed=['denied_repos']" in daemon.reload('denied_repos = ["org/*"]\n')
        assert task.refused("fetch", repo_id="org/model").error, "what is here is no longer handed out"
        said = daemon.reload('denied_repos = ["org/*"]\nhub_connections = 2\nhub_rate = "10MB/s"\n')
        assert "changed=['hub_rate'] need_a_restart=['hub_connections']" in said
        assert daemon.status()["rates"] == {"hub_rate": 10_000_000, "store_rate": 0}
        said = daemon.reload('denied_repos = 5\nhub_rate = "fast"\n')
        assert said.count("not taken over") >= 1 and "denied_repos" in said and "event=reloaded" not in said
        assert task.refused("fetch", repo_id="org/model").error, "a broken file changes nothing"
        daemon.reload("")
        task.fetch("org/model")
