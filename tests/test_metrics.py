"""Metrics: what Prometheus reads is what happened, every name is documented, and every rule of the example names one that there is."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelcached.metrics import COUNTER, GAUGE, LATENCY, LATENCY_WORDS, METRICS

from .clients import Client
from .conftest import ROOT
from .daemon import Daemon, DaemonError
from .hub import Hub, Random

Samples = dict[tuple[str, str], float]  # name and the label's value


def scrape(daemon: Daemon) -> Samples:
    found = re.findall(r"event=metrics address=(\S+)", daemon.log)
    address = found[-1]
    if address.startswith("unix:"):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(address.removeprefix("unix:"))
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    else:
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next((sample.labels[name] for name in ("tier", "where", "method") if name in sample.labels), "")
            samples[sample.name, label] = sample.value  # of a histogram's buckets the last: +Inf
    return samples


def test_what_happens_is_counted(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/model", {"config.json": b"{}", "model.safetensors": Random(1, 3 << 20)})
    with Daemon.start(tmp_path / "root", hub, metrics="127.0.0.1:0") as daemon, Client.of(daemon) as task:
        before = scrape(daemon)
        assert before["modelcached_fetches_total", "hub"] == before["modelcached_connections", ""] == 0
        task.download("org/model")
        task.download("org/model")
        cold = scrape(daemon)
        assert (cold["modelcached_fetches_total", "hub"], cold["modelcached_fetches_total", "disk"]) == (1, 1)
        assert cold["modelcached_received_bytes_total", "hub"] == (3 << 20) + 2
        assert cold["modelcached_leases", ""] == cold["modelcached_connections", ""] == 1
        assert cold["modelcached_hub_requests_total", ""] >= 2
        assert cold["modelcached_request_seconds_count", "fetch"] == 2 and cold["modelcached_request_seconds_sum", "fetch"] > 0
        assert cold["modelcached_request_seconds_count", "fetch"] == cold["modelcached_request_seconds_bucket", "fetch"]
        assert cold["process_resident_memory_bytes", ""] > 1 << 20


def test_saves_and_loads_are_counted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights.bin").write_bytes(bytes(1 << 20))
    with Daemon.start(tmp_path / "root", metrics=f"unix:{tmp_path}/m.sock") as daemon, Client.of(daemon) as task:
        task.begin("save", path=str(tmp_path / "out"))
        reference = task.good().value
        task.begin("flush")
        task.good()
        task.begin("load", reference=reference)
        task.good()
        seen = scrape(daemon)
        assert (seen["modelcached_sent_saves_total", ""], seen["modelcached_spool_saves", ""]) == (1, 0)
        assert seen["modelcached_sent_bytes_total", ""] == 1 << 20
        assert seen["modelcached_loads_total", "disk"] == 1
    assert not (tmp_path / "m.sock").exists()


def test_only_metrics_are_served(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", metrics="127.0.0.1:0") as daemon:
        address = re.findall(r"event=metrics address=(\S+)", daemon.log)[-1]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address.replace("/metrics", "/"))
        assert refused.value.code == 404
        refused.value.close()


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DaemonError) as refused:
        Daemon.start(tmp_path / "root", metrics=f"127.0.0.1:{taken.getsockname()[1]}")
    assert "metrics can't be served" in str(refused.value) and "--metrics" in str(refused.value)


def test_without_the_setting_nothing_listens(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        assert "event=metrics" not in daemon.log
        maps = Path(f"/proc/{daemon.pid}/net/tcp").read_text()
        inodes = {line.split()[9] for line in maps.splitlines()[1:] if line.split()[3] == "0A"}
        own = set()
        for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                own.add(str(link.readlink()))
        assert not {f"socket:[{inode}]" for inode in inodes} & own


def test_every_metric_is_documented_as_it_is() -> None:
    rows = re.findall(r"^\| `(modelcached_\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| (.*?) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    endings = {COUNTER: ("_total", "counter"), GAUGE: ("", "gauge")}
    there = [(f"modelcached_{told.name}{endings[told.kind][0]}", endings[told.kind][1], told.label, told.words) for told in METRICS]
    assert rows == [*there, (f"modelcached_{LATENCY}", "histogram", "method", LATENCY_WORDS)]


def test_every_alert_names_metrics_that_there_are() -> None:
    text = (ROOT / "examples" / "prometheus" / "alerts.yml").read_text()
    documented = set(re.findall(r"^\| `(modelcached_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.M))
    expressions = re.findall(r"^\s+expr: (.*)$", text, re.M)
    alerts, actions = re.findall(r"^\s+- alert: Modelcached\w+$", text, re.M), re.findall(r"^\s+action: ", text, re.M)
    assert len(expressions) == len(alerts) == len(actions) > 5
    named = {name for expression in expressions for name in re.findall(r"\bmodelcached_\w+", expression)}
    assert len(named) > 5 and named <= documented
