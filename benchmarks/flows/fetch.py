"""Eight tasks that need one repo. BENCH_PACKAGES is where metaflow-checkpoint finds huggingface_hub."""

# mypy: ignore-errors

import json
import os
import sys

sys.path.append(os.environ["BENCH_PACKAGES"])  # the last resort, as it has other versions of the package's own dependencies

from metaflow import FlowSpec, current, huggingface_hub, step

REPO = os.environ["BENCH_REPO"]


class FetchFlow(FlowSpec):
    @step
    def start(self):
        self.tasks = list(range(8))
        self.next(self.work, foreach="tasks")

    @huggingface_hub(load=[REPO])
    @step
    def work(self):
        path = current.huggingface_hub.loaded[REPO]
        names = [name for name in os.listdir(path) if name.endswith(".safetensors")]
        print("bytes", json.dumps(sum(os.path.getsize(os.path.join(path, name)) for name in names)))
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    FetchFlow()
