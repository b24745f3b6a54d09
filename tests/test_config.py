from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelcached import config
from modelcached.config import SETTINGS, Config, ConfigError, load
from modelcached.kinds import Space


def load_file(tmp_path: Path, text: str, flags: dict[str, str] | None = None, environment: dict[str, str] | None = None) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(flags or {}, environment or {}, file=file)


def problems(**sources: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        load(sources.pop("flags", {}), sources.pop("environment", {}), default_file=Path("/nonexistent"), **sources)
    return {problem.field: str(problem) for problem in raised.value.problems}


def test_defaults() -> None:
    settings = load({}, {}, default_file=Path("/nonexistent"))
    assert settings == Config()
    assert set(settings.origins.values()) == {"default"}
    assert settings.endpoints == ("https://huggingface.co",)
    assert load({}, {}, private=True).idle_exit == 600


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text = 'fresh_seconds = "1m"\nhub_connections = 2\nstall_seconds = 3\n'
    environment = {"MODELCACHED_FRESH_SECONDS": "2m", "MODELCACHED_HUB_CONNECTIONS": "3"}
    settings = load_file(tmp_path, text, {"fresh_seconds": "3m"}, environment)
    assert (settings.fresh_seconds, settings.hub_connections, settings.stall_seconds, settings.hub_attempts) == (180, 3, 3, 6)
    names = ("fresh_seconds", "hub_connections", "stall_seconds", "hub_attempts")
    assert [settings.origins[name] for name in names] == [
        "flag --fresh-seconds",
        "environment MODELCACHED_HUB_CONNECTIONS",
        f"file {tmp_path}/config.toml",
        "default",
    ]


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("root", "/r", Path("/r")),
        ("hub_piece", "1048576", 1 << 20),
        ("hub_piece", "1MiB", 1 << 20),
        ("hub_piece", "1.5 MB", 1_500_000),
        ("hub_range", "1g", 10**9),
        ("min_free", "0", Space()),
        ("min_free", "10GB", Space(10**10)),
        ("min_free", "2.5%", Space(share=0.025)),
        ("fresh_seconds", "90", 90),
        ("fresh_seconds", "1.5h", 5400),
        ("fresh_seconds", "2d", 172800),
        ("hub_backoff_seconds", "500ms", 0.5),
        ("idle_exit", "never", None),
        ("idle_exit", "10m", 600),
        ("offline", "yes", True),
        ("offline", "0", False),
        ("max_connections", "5", 5),
        ("metrics", "", ""),
        ("metrics", "127.0.0.1:0", "127.0.0.1:0"),
        ("metrics", "[::1]:9464", "[::1]:9464"),
        ("metrics", "localhost:9464", "localhost:9464"),
        ("metrics", "unix:/run/m.sock", "unix:/run/m.sock"),
        ("hub_endpoint", "http://localhost:8080/", "http://localhost:8080"),
        ("hub_endpoints", "https://a/, https://b/x https://a", ("https://a", "https://b/x")),
    ],
)
def test_values_as_text(field: str, text: str, value: object) -> None:
    assert getattr(load({field: text}, {}, default_file=Path("/nonexistent")), field) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("root", "relative"),
        ("socket", "/" + "x" * 107),
        ("hub_piece", "many"),
        ("hub_piece", "1KiB"),
        ("hub_piece", "-1"),
        ("min_free", "100%"),
        ("min_free", "x%"),
        ("fresh_seconds", "-1"),
        ("fresh_seconds", "nan"),
        ("fresh_seconds", "1 week"),
        ("idle_exit", "0"),
        ("offline", "perhaps"),
        ("max_connections", "1.5"),
        ("max_connections", "0"),
        ("metrics", "0.0.0.0:9464"),
        ("metrics", "example.org:9464"),
        ("metrics", "127.0.0.1"),
        ("metrics", "127.0.0.1:65536"),
        ("metrics", "unix:m.sock"),
        ("hub_endpoint", "ftp://host"),
        ("hub_endpoint", "https://"),
        ("hub_endpoint", "https://[::1"),
        ("hub_endpoint", "https://host/?token=x"),
        ("hub_endpoints", "https://ok,host"),
        ("store", "gs://bucket"),
        ("store", "s3:///prefix"),
        ("stores", "file:///ok,s3://key:secret@bucket"),
        ("hub_range", "64KiB"),  # less than hub_piece
    ],
)
def test_values_that_are_refused(field: str, text: str) -> None:
    assert list(problems(flags={field: text})) == [field]


def test_every_default_is_allowed_and_comes_back_from_its_own_spelling(tmp_path: Path) -> None:
    text = "\n".join(f"{name} = {config.as_toml(field, field.default)}" for name, field in SETTINGS.items())
    assert load_file(tmp_path, text) == Config()


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = 'rot = "/x"\nhub_conections = 3\nsocket = 5\nfresh_seconds = true\nprivate = true\nzzz = 1\nhub_endpoint = "https://me:secret@host"\n'
    (tmp_path / "config.toml").write_text(text)
    environment = {"MODELCACHED_STALL_SECONDS": "long", "MODELCACHED_HUB_RANG": "1", "MODELCACHED_PORT": "tcp://10.0.0.1:80"}
    found = problems(flags={"max_connections": "-3"}, environment=environment, file=tmp_path / "config.toml")
    wanted = "rot hub_conections socket fresh_seconds private zzz hub_endpoint stall_seconds hub_rang max_connections"
    assert sorted(found) == sorted(wanted.split())  # MODELCACHED_PORT is Kubernetes' doing
    assert "did you mean root?" in found["rot"] and "did you mean hub_connections?" in found["hub_conections"]
    assert "did you mean hub_range?" in found["hub_rang"] and "environment MODELCACHED_HUB_RANG" in found["hub_rang"]
    assert "absolute path" in found["socket"] and "duration" in found["stall_seconds"] and "from 1" in found["max_connections"]
    assert "--private" in found["private"] and str(tmp_path) in found["socket"] and "secret" not in found["hub_endpoint"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("root = \n")
    (tmp_path / "binary.toml").write_bytes(b"root = '\xff'")
    assert "no such file" in problems(file=tmp_path / "missing.toml")["config"]
    assert "can't be read" in problems(file=tmp_path)["config"]
    assert "not TOML" in problems(file=tmp_path / "bad.toml")["config"]
    assert "not TOML" in problems(file=tmp_path / "binary.toml")["config"]


def test_private_daemon_does_not_read_the_nodes_file(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('root = "/node"\n')
    assert load({}, {}, default_file=tmp_path / "node.toml").root == Path("/node")
    assert load({}, {}, default_file=tmp_path / "node.toml", private=True, defaults={"root": Path("/mine")}).root == Path("/mine")


def test_huggingface_hubs_variables_are_defaults() -> None:
    environment = {"HF_ENDPOINT": "http://mirror/", "HF_HUB_OFFLINE": "ON"}
    settings = load({}, environment, private=True)
    assert (settings.hub_endpoint, settings.offline) == ("http://mirror", True)
    assert settings.origins["hub_endpoint"] == "environment HF_ENDPOINT"
    settings = load({}, {**environment, "MODELCACHED_HUB_ENDPOINT": "http://own", "MODELCACHED_HUB_ENDPOINTS": "http://mirror,http://own"})
    assert settings.endpoints == ("http://own", "http://mirror")


def test_room_of_a_filesystem() -> None:
    assert (Space(10).of(1000), Space(share=0.05).of(1000), Space().of(1000)) == (10, 50, 0)
    assert (str(Space(10)), str(Space(share=0.05))) == ("10", "5%")


def test_every_field_is_documented() -> None:
    assert all(field.metadata["doc"] and config.allowed(field) for field in SETTINGS.values())
