"""An unmodified program: transformers loads a model through `modelcache exec`, offline, and computes what it computed before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .daemon import Daemon
from .hub import Hub

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

MAKE = """
import sys, torch
from transformers import BertConfig, BertModel
torch.manual_seed(7)
config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
model = BertModel(config).eval()
model.save_pretrained(sys.argv[1], max_shard_size="40KB")
print(float(model(torch.tensor([[1, 2, 3]])).last_hidden_state.double().sum()))
"""

LOAD = """
import os, torch
from transformers import AutoModel
assert os.environ["HF_HUB_OFFLINE"] == "1"
model = AutoModel.from_pretrained("acme/tiny-bert").eval()
print(float(model(torch.tensor([[1, 2, 3]])).last_hidden_state.double().sum()))
"""


def test_transformers_loads_through_exec(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "made")], check=True, capture_output=True, text=True, timeout=200)
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1, "several shards, or the index is not tried"
    with Hub.start(tmp_path / "hub") as hub, Daemon.start(tmp_path / "root", hub) as daemon:
        hub.commit("acme/tiny-bert", files)
        loaded = subprocess.run(
            [sys.executable, "-m", "modelcache", "exec", "acme/tiny-bert", "--", sys.executable, "-c", LOAD],
            env=daemon.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.split()[-1] == made.stdout.split()[-1]
