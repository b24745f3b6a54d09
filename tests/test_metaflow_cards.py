"""Cards of real runs, read back with Metaflow's own command."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import Run, Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FORGED = "<script>alert(1)</script> **bold** [link](x)"
FLOW = "cards.py"


class Card(NamedTuple):
    html: str
    parts: list[dict[str, Any]]

    def rows(self, title: str) -> list[dict[str, str]]:
        """The table below a heading, with its columns' names."""
        (at,) = [number for number, part in enumerate(self.parts) if part.get("source") == f"## {title}"]
        table = self.parts[at + 1]
        assert table["type"] == "table"
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    @property
    def markdown(self) -> list[str]:
        return [part["source"] for part in self.parts if part["type"] == "markdown"]

    @property
    def plotted(self) -> list[dict[str, Any]]:
        (plot,) = [part for part in self.parts if part["type"] == "vegaChart"]
        return list(plot["spec"]["data"]["values"])


class World(NamedTuple):
    runs: Runs
    commit: str  # of org/tiny
    second: str  # of org/second
    run: Run
    elsewhere: Run  # its last step again, on a node that had nothing

    def card(self, step: str, name: str, run: Run | None = None) -> Card:
        path = self.runs.folder / "card.html"
        self.runs.run(FLOW, "card", "get", f"{(run or self.run).id}/{step}", "--id", name, str(path))
        html = path.read_text()
        (data,) = re.findall(r'window\.__MF_DATA__\["[^"]+"\] = "([^"]+)"', html)
        (page,) = json.loads(base64.b64decode(data))["components"]
        return Card(html, page["contents"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("cards")
    with Hub.start(folder / "hub") as hub:
        files = {"config.json": b"{}", "weights.safetensors": b"w" * 5000}
        commit, second = hub.commit("org/tiny", files), hub.commit("org/second", {**files, "other.json": b"[]"})
        store = f"file://{folder}/store"
        with Daemon.start(folder / "root", hub, store=store) as daemon, Daemon.start(folder / "other", hub, store=store) as other:
            runs = Runs(folder, daemon.environment)
            run = runs.run(FLOW)
            runs.environment.update(other.environment)
            yield World(runs, commit, second, run, runs.run(FLOW, "resume", "end", "--origin-run-id", run.id))


def test_what_was_loaded_from_the_hub(world: World) -> None:
    whole, selected = world.card("start", "huggingface_hub_models").rows("Loaded")
    assert (whole["Repo"], whole["Type"], whole["Commit"], whole["Selection"]) == ("org/tiny", "model", world.commit, "everything")
    assert (whole["Size"], whole["From"], whole["Path"]) == ("5.0 kB", "disk", "shared view")  # the attempt that failed had fetched it
    assert (selected["Repo"], selected["Commit"], selected["Selection"]) == ("org/second", world.second, "only *.json")
    assert (selected["From"], selected["Path"]) == ("hub", "–") and float(selected["Seconds"]) >= 0
    assert selected["Key"].startswith("mf.huggingface_hub/checkpoints/artifacts/CardsFlow/start/")


def test_models_with_metadata_and_lineage(world: World) -> None:
    card = world.card("start", "model_card")
    (saved,) = card.rows("Saved")
    assert saved["Label"] == "trained" and saved["Format"] == "tar" and float(saved["Blocked s"]) >= 0
    said = {row["Name"]: row["Value"] for row in card.rows("Metadata of what was saved")}
    assert said == {"note": FORGED, "accuracy": "0.75"}
    assert "<script>alert" not in card.html and not any("bold" in text for text in card.markdown), "only ever a cell's text"
    lineage = card.rows("Lineage")
    assert lineage[0]["What"] == f"CardsFlow/{world.run.id}/start/1, attempt 1"
    assert [(row["What"], row["From"]) for row in lineage[1:]] == [
        ("own", f"CardsFlow/{world.run.id}/start/1, attempt 0"),
        ("org/tiny", f"org/tiny@{world.commit}"),
        ("org/second", f"org/second@{world.second}"),
    ]

    repo, trained = world.card("end", "model_card").rows("Loaded")
    assert (repo["Name"], repo["Type"], repo["Path"], repo["Saved by"]) == ("repo", "checkpoint", "./repo", f"org/second@{world.second}")
    assert (trained["Name"], trained["Path"]) == ("trained", "./mine") and json.loads(trained["Metadata"])["note"] == FORGED
    assert trained["Saved by"] == f"CardsFlow/{world.run.id}/start/1, attempt 1" and trained["From"] == "disk"
    assert [row["From"] for row in world.card("end", "model_card", world.elsewhere).rows("Loaded")] == ["store", "store"]


def test_checkpoints_of_all_attempts(world: World) -> None:
    card = world.card("start", "task_checkpoints")
    rows = card.rows("Saved, newest first")
    assert [(row["Name"], row["Attempt"], row["Size"]) for row in rows] == [
        ("own", "1", "2.0 kB"), ("childs", "0", "1.0 kB"), ("own", "0", "1.0 kB")
    ]  # fmt: skip
    assert all(float(row["Blocked s"]) >= 0 for row in rows) and rows[0]["Metadata"] == '{"loss": 0.5}'
    assert [(point["name"], point["MB"], point["blocked"]) for point in card.plotted] == [
        (row["Name"], float(row["Size"].split()[0]) / 1000, float(row["Blocked s"])) for row in reversed(rows)
    ]
    (began,) = card.rows("Loaded")
    assert began[""] == "the task began with it" and began["Saved by"] == f"CardsFlow/{world.run.id}/start/1, attempt 0"
    said = r"3 saved, 4\.0 kB\. At its end the task waited \d+\.\d\d seconds for the store\."
    assert re.fullmatch(said, card.markdown[1].strip()), card.markdown


def test_none_where_they_are_turned_off_or_nothing_happened(world: World) -> None:
    found = world.runs.folder.parent.rglob("mf.cards/**/steps/**/*.html")  # Metaflow 2.18 puts them elsewhere too
    pages = {path.parts[-5] + "/" + path.name.split("-")[1] for path in found}
    assert pages == {"start/huggingface_hub_models", "start/model_card", "start/task_checkpoints", "end/model_card"}
    for step in ("quiet", "idle"):
        assert "not found" in world.runs.run(FLOW, "card", "get", f"{world.run.id}/{step}", expected=1).output.lower(), step
    assert world.run.the("idle", "imported") is world.run.the("end", "imported") is False
    assert "no card" not in world.run.output
