"""`python -m examples.run NAME [ARGUMENTS...]`: an example of examples/flows with its own hub, daemon and datastore, without a network.

Everything lies in one folder (--folder), which stays, so that a flow finds what another one saved; removing it removes everything.
Each example runs in a folder of its name there.
"""

from __future__ import annotations

import argparse
import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.daemon import Daemon
from tests.hub.handle import Hub

FLOWS = Path(__file__).with_name("flows")
BERT = ".gitattributes README.md LICENSE config.json flax_model.msgpack tf_model.h5 tokenizer.json pytorch_model.bin vocab.txt model.onnx"
BERT += " rust_model.ot model.safetensors tokenizer_config.json coreml/model.mlpackage"
MISTRAL = "README.md config.json tokenizer.json tokenizer.model model.safetensors pytorch_model.bin"


def fill(hub: Hub) -> None:
    """The repos that the examples ask for, with a few bytes for each of their files."""
    for repo, names in (
        ("bert-base-uncased", BERT),
        ("google-bert/bert-base-uncased", BERT),
        ("mistralai/Mistral-7B-Instruct-v0.1", MISTRAL),
        ("myorg/mistral-lora", "adapter_config.json adapter_model.safetensors"),
    ):
        hub.commit(repo, {name: f"{name} of {repo}\n".encode() for name in names.split()})
    hub.commit("org/model-name", {"rows.csv": b"x,y\n0,1\n"}, repo_type="dataset")
    hub.commit("demo/line", {"line.json": b'{"slope": 0.0, "offset": 0.0}', "README.md": b"a straight line"})


def main() -> int:
    names = sorted(path.stem for path in FLOWS.glob("*.py"))
    folder = Path(tempfile.gettempdir()) / f"modelcached-examples-{os.getuid()}"
    parser = argparse.ArgumentParser(prog="python -m examples.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=folder, help="where everything lies (%(default)s)")
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program is given; of a flow it is `run` if there are none")
    options = parser.parse_args()
    script = FLOWS / f"{options.name}.py"
    work = options.folder.absolute() / options.name
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="modelcached-hub-") as state, Hub.start(state) as hub:
        fill(hub)
        with Daemon.start(options.folder.absolute() / "cache", hub, log_level="warning") as daemon:
            environment = {
                **daemon.environment,
                "HF_ENDPOINT": hub.endpoint,
                "METAFLOW_USER": os.environ.get("METAFLOW_USER") or getpass.getuser().replace("root", "example"),  # it takes no root
                "METAFLOW_HOME": str(options.folder / "home"),
                "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(options.folder.absolute()),
            }
            arguments = options.arguments or (["run"] if "FlowSpec" in script.read_text() else [])
            return subprocess.run([sys.executable, str(script), *arguments], cwd=work, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
