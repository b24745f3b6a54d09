"""Repos of the hub in all the forms that the decorator takes."""

import json
import os

from metaflow import FlowSpec, Parameter, current, huggingface_hub, load_model, model, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class ReposFlow(FlowSpec):
    revision = Parameter("revision", default="main")
    force = Parameter("force", default=False, type=bool)

    @huggingface_hub(
        load=[
            "org/tiny",
            ("org/data", "./mine"),
            {"repo_id": "org/third", "allow_patterns": ["*.json"]},
        ]
    )
    @step
    def start(self):
        loaded = current.huggingface_hub.loaded
        show("contents", {name: sorted(os.listdir(path)) for name, path in loaded.items()})
        show("path", loaded["org/data"])
        show("hits", {name: loaded.info[name]["cache_hit"] for name in loaded})
        show("metadata", loaded.info["org/third"]["metadata"])
        self.reference = current.huggingface_hub.snapshot_download(repo_id="org/tiny", allow_patterns="*.json")
        show("reference", self.reference)
        self.next(self.everybody)

    @huggingface_hub(cache_scope="global", load=[({"repo_id": "org/tiny"}, "./put/here")])
    @model(load="reference")
    @step
    def everybody(self):
        show("selected", sorted(os.listdir(current.model.loaded["reference"])))
        show("here", sorted(os.listdir("./put/here")))
        show("global", current.huggingface_hub.loaded.info["org/tiny"]["key"])
        hub = current.huggingface_hub
        reference = hub.snapshot_download(repo_id="org/moving", revision=self.revision, force_download=self.force)
        show("moved", [reference["metadata"]["commit"], reference["key"]])
        with hub.load("org/moving", revision=self.revision) as path:
            show("block", open(os.path.join(path, "which")).read())
        with hub.load(repo_id="org/moving", path="./kept", revision=self.revision) as path:
            show("kept", [path, sorted(os.listdir(path))])
        load_model(reference, "./loaded")
        show("loaded", sorted(os.listdir("./loaded")))
        self.next(self.end)

    @huggingface_hub(cache_scope="flow", temp_dir_root="./temporary")
    @step
    def end(self):
        with current.huggingface_hub.load("org/tiny") as path:
            show("temporary", [os.path.dirname(path), os.access(os.path.join(path, "config.json"), os.W_OK)])
        show("gone", os.path.exists(path))
        show("exists", sorted(name for name in ("./put/here", "./kept") if os.path.exists(name)))


if __name__ == "__main__":
    ReposFlow()
