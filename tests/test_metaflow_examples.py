"""Every example runs as a reader runs it, and says what it should; those that users know from elsewhere keep every line of theirs.

tests/documented/NAME.txt has what the users of metaflow-checkpoint were shown: the lines of a flow or fragment, without comments,
and below `--- output` what its steps printed, with `*` for what differs from run to run. Two things are other, on purpose: no
environment is built from a package index, and `*.json` is what a reference to `*.json` gives, not the whole repo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from examples.run import FLOWS, fill

from .conftest import ROOT
from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import Run, Runs
from .seaweed import SeaweedFS
from .test_metaflow_stores import private

DOCUMENTED = Path(__file__).parent / "documented"
EXAMPLES = sorted(path.stem for path in FLOWS.glob("*.py"))
MISTRAL = "['README.md', 'config.json', 'model.safetensors', 'pytorch_model.bin', 'tokenizer.json', 'tokenizer.model']"

# What has to have run before.
AFTER = {
    "api_load_model_outside": "api_load_model",
    "fine_tune_load": "fine_tune",
    "model_load_client_api": "model_load_basic_key",
    "model_load_event": "model_refresh",
    "model_load_key_param": "model_load_basic_key",
    "model_load_notebook": "model_load_basic_key",
}
# What an example has to say of which no document tells; "-" is a program that is no flow.
SAYS = {
    "api_checkpoint_retry": [
        ("train", "Loaded checkpoint from the previous attempt"),
        ("train", "Loaded checkpoint from the previous attempt"),
        ("train", "Attempt 2 has seen ['0', '1', '2', '3']"),
    ],
    "api_checkpoint_save": [
        ("train", "Epochs: [20, 10, 0]"),
        ("train", "Best: True elsewhere: 0 in all: 4"),
        ("end", "Last: epoch_checkpoint 20"),
    ],
    "api_hf_block": [
        ("run_training", "Trains with: ['pytorch_model.bin']"),
        ("both", "Reference to: ['*.json']"),
        ("both", "In the block: ['config.json', 'tokenizer.json', 'tokenizer_config.json'] model.bin"),
    ],
    "api_hf_dicts": [
        ("finetune_model", f"Contents: {MISTRAL}"),
        ("my_step", "Model is loaded!"),
        ("my_step", "Commit: 40 digits"),
        ("another_step", "Loaded: ['mistralai/Mistral-7B-Instruct-v0.1', 'org/model-name']"),
    ],
    "api_hf_load": [
        ("pull_model_from_huggingface", f"Contents: {MISTRAL}"),
        ("finetune_model", "Path: ./my-directory and ./my-lora-directory"),
    ],
    "api_hf_reference": [("train", "Contents: ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer.model']")],
    "api_load_model": [("evaluate", "Loaded: ['weights.txt']")],
    "api_load_model_hf": [("use_model", f"Loaded: {MISTRAL}")],
    "api_load_model_outside": [("-", "Loaded: ['weights.txt']")],
    "api_model_load": [
        ("train", "Contents: ['weights.txt'] ['weights.txt']"),
        ("mid_step", "Both: {'chckpt_key': 'checkpoint', 'model_key': 'model'}"),
    ],
    "api_model_save": [
        ("test", "['weights.txt']"),
        ("test", "Metadata: {'epochs': 10, 'batch-size': 32, 'learning-rate': 0.001}"),
    ],
    "fine_tune": [
        ("train", "Begins with the base model"),
        ("train", "Goes on after epoch 29"),
        ("train", "Trained to a loss of 0.0007"),
        ("evaluate", "y = 2.0x + 1.0, after epoch 59"),
    ],
    "fine_tune_load": [("-", "Made by FineTuneFlow/*/train/*"), ("-", "At x = 10, y is about 21")],
    "model_load_event": [("start", "Triggering run Run('ModelRefreshFlow/*')"), ("start", "Model path *")],
    "model_refresh": [],
}
QUICK = ("fine_tune_load", "hub_deco_flow", "model_load_basic", "model_load_key_param", "model_load_notebook")
TAKES_SECONDS = [pytest.mark.slow, pytest.mark.timeout(240)]


class Place:
    """A node, its hub, one datastore; each example runs in a folder of its own, once."""

    def __init__(self, folder: Path, environment: dict[str, str], **more: str) -> None:
        self.runs = Runs(folder, environment, **more)
        self.folder = self.runs.folder
        self.ran: dict[str, Run] = {}

    def run(self, name: str) -> Run:
        if name not in self.ran:
            before = self.run(AFTER[name]) if name in AFTER else None
            self.runs.folder = self.folder / name
            self.runs.folder.mkdir()
            self.ran[name] = self.runs.python(str(FLOWS / f"{name}.py"), *_arguments(name, before))
        return self.ran[name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("examples")
    with Hub.start(folder / "hub") as hub:
        fill(hub)
        with Daemon.start(folder / "root", hub) as daemon:
            yield Place(folder, daemon.environment)


@pytest.mark.parametrize("name", [pytest.param(name, marks=TAKES_SECONDS if name in QUICK else pytest.mark.soak) for name in EXAMPLES])
def test_example(place: Place, name: str) -> None:
    _check(place.run(name), name)


@pytest.mark.soak
def test_on_s3_with_a_daemon_of_its_own(tmp_path: Path, seaweed: SeaweedFS) -> None:
    with Hub.start(tmp_path / "hub") as hub:
        fill(hub)
        place = Place(
            tmp_path,
            private(tmp_path, hub.endpoint),
            **seaweed.environment(),
            METAFLOW_DATASTORE_SYSROOT_S3=f"{seaweed.bucket()}/flows",
            METAFLOW_S3_ENDPOINT_URL=seaweed.endpoint,
            METAFLOW_DEFAULT_DATASTORE="s3",
        )
        for name in ("fine_tune", "fine_tune_load", "model_load_basic_key"):
            _check(place.run(name), name)


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCUMENTED.iterdir()))
def test_documented_lines_are_there_in_order(name: str) -> None:
    rest = iter(map(_comparable, (FLOWS / f"{name}.py").read_text().splitlines()))
    missing = [wanted for wanted in documented(name).code if not any(line == wanted or line.endswith(f"= {wanted}") for line in rest)]
    assert not missing, f"from here on they are not there in this order: {missing[0]}"


def test_every_example_is_listed_and_tested() -> None:
    index = (ROOT / "examples" / "README.md").read_text()
    assert sorted(set(re.findall(r"^\| \[`(\w+)`\]\(flows/\1\.py\)", index, re.M))) == EXAMPLES
    assert {path.stem for path in DOCUMENTED.iterdir()} | SAYS.keys() == set(EXAMPLES)
    for name, before in AFTER.items():
        assert f"python -m examples.run {before}\n" in (FLOWS / f"{name}.py").read_text()


class Documented(NamedTuple):
    code: list[str]
    output: list[tuple[str, str]]  # of which step, and the line


def documented(name: str) -> Documented:
    path = DOCUMENTED / f"{name}.txt"
    code, _, output = (path.read_text() if path.exists() else "").partition("--- output\n")
    lines = [line for line in map(_comparable, code.splitlines()) if line != "..." and not line.startswith("@pypi_base(")]
    said = [line.partition(" | ") for line in output.splitlines()]
    return Documented(lines, [(step, text) for step, _, text in said])


def _arguments(name: str, before: Run | None) -> list[str]:
    if name == "model_load_key_param":
        assert before is not None
        (key,) = re.findall(r"with key: (\S+)", before.output)
        return ["run", "--model-key", key]
    if name == "api_load_model_outside":
        assert before is not None
        return [f"MyFlow/{before.id}"]
    return ["run"] if "FlowSpec" in (FLOWS / f"{name}.py").read_text() else []


def _check(run: Run, name: str) -> None:
    """Every line that is wanted of a step is there, in order. What the decorators say is in another stream than what the step prints."""
    wanted = documented(name).output + SAYS.get(name, [])
    said = [("-", line) for line in run.output.splitlines()] + [(line.step, line.text) for line in run.lines]
    for is_ours in (True, False):
        rest = iter([(step, masked(text)) for step, text in said if text.startswith("[@") == is_ours])
        for step, text in wanted:
            if text.startswith("[@") == is_ours:
                assert (step, masked(text)) in rest, f"{step}: {text}\n{run.output[-4000:]}"


def masked(line: str) -> str:
    """Without what differs from run to run: ids, paths, seconds, the order of a listing. A folder in one is not always told."""
    line = re.sub(r"(mf\.\w+/checkpoints/artifacts/\w+/\w+)/\S+", r"\1/*", line)
    line = re.sub(r"(mf\.models/models/artifacts/\w+?)_[0-9a-f]{32}", r"\1_*", line)
    line = re.sub(r"(?<=\s)/\S*?(?=/model\.h5|\. |\s|$)", "*", line)
    line = re.sub(r"(\w+Flow)/\d+/(\w+)/\d+", r"\1/*/\2/*", line)
    line = re.sub(r"(\w+Flow)/\d+'", r"\1/*'", line)
    line = re.sub(r"`[0-9a-f]{6}\[", "`*[", line)
    line = re.sub(r"in \d+\.\d\d seconds", "in * seconds", line)
    return re.sub(r"\[('[^]]*')\]", lambda found: str(sorted({*re.findall("'(.*?)'", found[0])} - {"coreml"})), line)


def _comparable(line: str) -> str:
    """Without comments; absolute folders stand below the working directory, and an id is whichever it is."""
    line = re.sub(r"(^|\s+)#.*$", "", line).strip()
    line = re.sub(r'"\.?/(?=\w)', '"./', line).replace("pypi_base, ", "")
    return re.sub(r"Run\([^)]*\)", "Run(*)", line)
