"""A Metaflow flow that saves with metaflow-checkpoint what that package can save, and loads it again: test_legacy.py compares.

It runs in the package's own virtualenv, as `old_flow.py run`. In the environment: OLD_FLOW, a folder with `content/` in it; there the
references go as JSON, and `loaded/<name>` is what the package itself makes of each. OLD_NAMES says what: on S3 each takes seconds.
HUB_PACKAGES is where huggingface_hub is found.
"""

# mypy: ignore-errors

import json
import os
import sys

sys.path.append(os.environ["HUB_PACKAGES"])  # the last resort, as it has other versions of the package's own dependencies

from metaflow import Checkpoint, FlowSpec, checkpoint, current, huggingface_hub, load_model, model, step

FOLDER = os.environ["OLD_FLOW"]
CONTENT = os.path.join(FOLDER, "content")


class OldFlow(FlowSpec):
    @huggingface_hub(load=[{"repo_id": "org/old", "token": os.environ["HUB_TOKEN"]}])
    @model
    @checkpoint(show_card=False)
    @step
    def start(self):
        saved = {"repo": dict(current.huggingface_hub.loaded.info["org/old"])}
        metadata = {"loss": float("nan"), "steps": [1, 2], "one": {"$float": "nan"}}
        names = os.environ["OLD_NAMES"].split(",")
        for name in names:
            what, _, kind = name.partition("_")
            if what == "model":
                saved[name] = current.model.save(CONTENT, label="lab.el", metadata=metadata, storage_format=kind)
            elif what == "file":
                saved[name] = current.model.save(os.path.join(CONTENT, "large"), storage_format=kind)
            elif what == "checkpoint":
                saved[name] = current.checkpoint.save(CONTENT, name="name" + kind, metadata=metadata, storage_format=kind)
        for name in names:
            reference, path = saved[name], os.path.join(FOLDER, "loaded", name)
            if reference["type"] == "model":
                load_model(reference, path)
            else:
                Checkpoint().load(reference["key"], path)
        with open(os.path.join(FOLDER, "references.json"), "w") as file:
            json.dump(saved, file)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    OldFlow()
