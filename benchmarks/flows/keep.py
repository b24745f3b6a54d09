"""One step saves a model, one a checkpoint, one loads both. Prints a word and its JSON; BENCH_SOURCE is the folder that is saved."""

# mypy: ignore-errors

import json
import os
import time

from metaflow import FlowSpec, checkpoint, current, model, step

SOURCE = os.environ["BENCH_SOURCE"]


class KeepFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.save_model)

    @model
    @step
    def save_model(self):
        begin = time.perf_counter()
        self.saved = current.model.save(SOURCE, label="bench")
        print("blocked", json.dumps(time.perf_counter() - begin))
        self.next(self.save_checkpoint)

    @checkpoint
    @step
    def save_checkpoint(self):
        begin = time.perf_counter()
        self.point = current.checkpoint.save(SOURCE)
        print("blocked", json.dumps(time.perf_counter() - begin))
        self.next(self.load)

    @model(load=["saved", "point"])
    @step
    def load(self):
        for name in ("saved", "point"):
            path = current.model.loaded[name]
            print("bytes", json.dumps(sum(os.path.getsize(os.path.join(path, each)) for each in os.listdir(path))))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    KeepFlow()
