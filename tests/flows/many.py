"""Many tasks at once: a foreach with equal items, one inside another, and a step that fails until it is resumed."""

import json
import os

from metaflow import FlowSpec, checkpoint, current, huggingface_hub, model, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class ManyFlow(FlowSpec):
    @step
    def start(self):
        self.outer = ["same"] * int(os.environ.get("TASKS", "2"))
        self.next(self.work, foreach="outer")

    @huggingface_hub(load=["org/tiny"])
    @checkpoint(load_policy="eager")
    @step
    def work(self):
        info = current.checkpoint.info
        show("work", [self.index, current.checkpoint.task_identifier, info and info.metadata["index"]])
        show("hub", [self.index, sorted(os.listdir(current.huggingface_hub.loaded["org/tiny"]))])
        self.saved = current.checkpoint.save(__file__, metadata={"index": self.index}, storage_format="tar")
        self.inner = [0, 1] if self.index == 0 else [0]
        self.next(self.nested, foreach="inner")

    @checkpoint(load_policy="eager")
    @step
    def nested(self):
        info = current.checkpoint.info
        path = [index for index, _, _ in self.foreach_stack()]
        show("nested", [path, info and info.metadata["path"]])
        current.checkpoint.save(__file__, metadata={"path": path})
        self.next(self.inner_join)

    @step
    def inner_join(self, inputs):
        self.saved = inputs[0].saved
        self.next(self.outer_join)

    @step
    def outer_join(self, inputs):
        self.merge_artifacts(inputs, exclude=["saved"])
        self.saved = inputs[0].saved
        self.next(self.end)

    @model(load="saved")
    @checkpoint(load_policy="eager")
    @step
    def end(self):
        show("end", [current.checkpoint.is_loaded, os.listdir(current.checkpoint.directory), os.listdir(current.model.loaded["saved"])])
        with open(os.path.join(current.checkpoint.directory, "state"), "w") as file:
            file.write("almost")
        current.checkpoint.save()
        if not os.path.exists("mended"):
            raise RuntimeError("not yet")


if __name__ == "__main__":
    ManyFlow()
