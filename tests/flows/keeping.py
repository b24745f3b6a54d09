"""Checkpoints and models of one run, and what the next steps find of them."""

import json
import os
import subprocess
import sys

from metaflow import Checkpoint, FlowSpec, checkpoint, current, load_model, model, retry, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class KeepingFlow(FlowSpec):
    @retry(times=2, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        directory = current.checkpoint.directory
        show("begin", [current.retry_count, current.checkpoint.is_loaded, sorted(os.listdir(directory))])
        if current.retry_count:
            info = current.checkpoint.info
            show("info", [info.attempt, info.name, info.metadata, info.pathspec == current.pathspec])
            show("listed", [[each["name"], each["attempt"]] for each in current.checkpoint.list()])
            show("by attempt", [each["name"] for each in current.checkpoint.list(attempt="0")])
            show("by name", [each["name"] for each in Checkpoint().list(name="best")])
            show("everybody's", len(Checkpoint().list(full_namespace=True)))
        with open(os.path.join(directory, "epoch"), "a") as file:
            file.write(str(current.retry_count))
        self.first = current.checkpoint.save(metadata={"attempt": current.retry_count})
        if current.retry_count < 1:
            os.makedirs("best", exist_ok=True)
            with open("best/weights", "w") as file:
                file.write("good")
            Checkpoint().save("best/weights", {"loss": 0.5}, False, "best")
            child = "from metaflow import Checkpoint; Checkpoint().save('best', name='child', latest=False)"
            subprocess.run([sys.executable, "-c", child], check=True)
            raise RuntimeError("killed on purpose")
        self.next(self.middle)

    @checkpoint(load_policy="none")
    @model
    @step
    def middle(self):
        show("none", [current.checkpoint.is_loaded, os.listdir(current.checkpoint.directory)])
        current.checkpoint.load(self.first)
        show("loaded", sorted(os.listdir(current.checkpoint.directory)))
        with open("model.h5", "w") as file:
            file.write("a model")
        self.tarred = current.model.save("model.h5", label="basic.model", metadata={"loss": 0.25})
        self.files = current.model.save("best", storage_format="files")
        self.model_key = self.files["key"]
        show("reference", self.tarred)
        show("label", self.files["label"])
        self.next(self.end)

    @model(load=["tarred", ("model_key", "./models/mine"), "first"])
    @step
    def end(self):
        loaded = current.model.loaded
        show("names", sorted(loaded))
        show("contents", {name: sorted(os.listdir(path)) for name, path in loaded.items()})
        show("path", loaded["model_key"])
        show("is it", ["tarred" in loaded, "other" in loaded, loaded.info["tarred"]["metadata"], loaded.info["first"]["type"]])
        explicit = current.model.load(self.tarred, path="./explicit")
        show("explicit", [explicit, os.listdir(explicit), current.model.loaded.info[self.tarred["key"]]["label"]])
        load_model(self.files["key"], "./by_key")
        show("by key", os.listdir("./by_key"))


if __name__ == "__main__":
    KeepingFlow()
