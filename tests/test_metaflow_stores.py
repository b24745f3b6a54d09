"""Where a flow's saves go: with a private daemon below the flow's own datastore, in S3 or in a folder; and what is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .daemon import clean_environment
from .hub.handle import Hub
from .metaflow_runs import Runs
from .seaweed import SeaweedFS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def private(folder: Path, hub: str = "") -> dict[str, str]:
    """The environment of a user without a node's daemon, who has nothing yet."""
    for name in ("run", "data"):
        (folder / name).mkdir(mode=0o700)
    more = {"MODELCACHED_HUB_ENDPOINT": hub} if hub else {}
    folders = {"XDG_RUNTIME_DIR": str(folder / "run"), "XDG_DATA_HOME": str(folder / "data"), "HOME": str(folder)}
    return clean_environment(**folders, MODELCACHED_IDLE_EXIT="3", **more)


def test_s3(tmp_path: Path, seaweed: SeaweedFS) -> None:
    bucket = seaweed.bucket()
    with Hub.start(tmp_path / "hub") as hub:
        for name in ("org/tiny", "org/data", "org/third"):
            hub.commit(name, {"config.json": b"{}", "weights.safetensors": name.encode()})
        hub.commit("org/moving", {"which": b"first"})
        settings = {
            **seaweed.environment(),
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{bucket}/flows",
            "METAFLOW_S3_ENDPOINT_URL": seaweed.endpoint,
            "METAFLOW_DEFAULT_DATASTORE": "s3",
        }
        runs = Runs(tmp_path, private(tmp_path, hub.endpoint), **settings)
        run = runs.run("repos.py")
        reference = run.the("start", "reference")
        assert reference["store"] == f"{bucket}/flows/modelcached"
        objects = [each["Key"] for each in seaweed.client().list_objects_v2(Bucket=bucket[5:], Prefix="flows/modelcached/")["Contents"]]
        assert f"flows/modelcached/refs/{reference['key']}.json" in objects
        assert any(name.startswith("flows/modelcached/blobs/sha256/") for name in objects)
        assert run.the("everybody", "selected") == ["config.json"]

        runs.run("repos.py", "card", "get", f"{run.id}/start", "--id", "huggingface_hub_models", "card.html")
        assert "window.__MF_DATA__" in (runs.folder / "card.html").read_text()

        # Another node: nothing of it on its disk.
        other = tmp_path / "other"
        other.mkdir()
        elsewhere = Runs(other, private(other, hub.endpoint), **settings)
        asked = len(hub.requests())
        code = "import sys; from metaflow import load_model; load_model(sys.argv[1], 'here')"
        elsewhere.python("-c", code, reference["key"])
        assert (elsewhere.folder / "here" / "config.json").read_bytes() == b"{}"
        assert len(hub.requests()) == asked


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("policy", "load_policy is 'fresh' or 'eager' or 'none', not 'always'"),
        ("scope", "cache_scope is 'checkpoint' or 'flow' or 'global', not 'planet'"),
        ("repos", '@huggingface_hub(load=[("org/name", "./folder")])'),
        ("argument", "snapshot_download takes no 'patterns'"),
        ("artifacts", '@model(load=[("artifact", "./folder"), ("another", None)])'),
        ("card", "show_card is True or False"),
        ("folder", "temp_dir_root is a path"),
    ],
)
def test_what_makes_no_sense_is_said_before_a_task_starts(tmp_path: Path, kind: str, says: str) -> None:
    run = Runs(tmp_path, private(tmp_path), KIND=kind).run("wrong.py", expected=1)
    assert says in run.output and not run.lines
    assert "Traceback" not in run.output


def test_a_datastore_without_a_store(tmp_path: Path) -> None:
    azure = {"KIND": "fine", "METAFLOW_DATASTORE_SYSROOT_AZURE": "container/flows", "METAFLOW_AZURE_STORAGE_BLOB_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
    run = Runs(tmp_path, private(tmp_path), **azure).run("wrong.py", "--datastore", "azure", "run", expected=1)
    assert "'local' and 's3'" in run.output or "azure" in run.output
