"""Eager checkpoints of a foreach, and a repo: test_metaflow_old.py runs it with metaflow-checkpoint, then with ours.

OLD_TASK: a task whose checkpoints are listed too.
"""

import json
import os
import sys

sys.path += filter(None, [os.environ.get("HUB_PACKAGES")])  # metaflow-checkpoint wants huggingface_hub

from metaflow import Checkpoint, FlowSpec, checkpoint, current, huggingface_hub, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class EagerFlow(FlowSpec):
    @huggingface_hub(load=["org/old"])
    @step
    def start(self):
        show("repo", sorted(name for name in os.listdir(current.huggingface_hub.loaded["org/old"]) if name[0] != "."))
        self.items = ["one", "other"]
        self.next(self.work, foreach="items")

    @checkpoint(load_policy="eager")
    @step
    def work(self):
        directory, info = current.checkpoint.directory, current.checkpoint.info
        found = {}
        for name in sorted(os.listdir(directory)):
            with open(os.path.join(directory, name)) as file:
                found[name] = file.read()
        show("begin", [self.input, found, info and [info.name, info.attempt, info.metadata["epoch"], info.pathspec]])
        with open(os.path.join(directory, "state"), "w") as file:
            file.write(self.input)
        for epoch in range(2):
            current.checkpoint.save(name="epoch", metadata={"epoch": epoch, "loss": float("nan")}, storage_format=("tar", "files")[epoch])
        os.makedirs(self.input, exist_ok=True)
        current.checkpoint.save(path=self.input, name="best", latest=False, storage_format="tar")
        show("task", [self.input, current.pathspec])
        if "OLD_TASK" in os.environ:
            show("listed", [[each["name"], each["version_id"]] for each in Checkpoint().list(task=os.environ["OLD_TASK"])])
            show("everybody's", len(current.checkpoint.list(full_namespace=True)))
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    EagerFlow()
