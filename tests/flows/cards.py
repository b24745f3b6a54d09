"""Steps that have cards, a step whose cards are turned off, and one that did nothing."""

import os
import subprocess
import sys

from metaflow import FlowSpec, checkpoint, current, huggingface_hub, load_model, model, retry, step

FORGED = "<script>alert(1)</script> **bold** [link](x)"


def show_what_is_imported():
    print("imported %s" % ("true" if "modelcache.cards" in sys.modules else "false"), flush=True)


class CardsFlow(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @huggingface_hub(load=["org/tiny"])
    @model
    @checkpoint
    @step
    def start(self):
        with open(os.path.join(current.checkpoint.directory, "epoch"), "a") as file:
            file.write("x" * 1000)
        current.checkpoint.save(name="own", metadata={"loss": 0.5})
        if not current.retry_count:
            child = "from metaflow import Checkpoint; Checkpoint().save('.', name='childs', latest=False)"
            subprocess.run([sys.executable, "-c", child], check=True, cwd=current.checkpoint.directory)
            raise RuntimeError("once")
        self.repo = current.huggingface_hub.snapshot_download(repo_id="org/second", allow_patterns="*.json")
        self.saved = current.model.save(current.checkpoint.directory, label="trained", metadata={"note": FORGED, "accuracy": 0.75})
        self.next(self.quiet)

    @checkpoint(show_card=False)
    @model(load="saved", show_card=False)
    @huggingface_hub(load=["org/tiny"], show_card=False)
    @step
    def quiet(self):
        current.checkpoint.save(current.model.loaded["saved"])
        self.next(self.idle)

    @checkpoint
    @model
    @huggingface_hub
    @step
    def idle(self):
        show_what_is_imported()
        self.next(self.end)

    @model(load=[("repo", "./repo")])
    @step
    def end(self):
        load_model(self.saved, "./mine")
        show_what_is_imported()


if __name__ == "__main__":
    CardsFlow()
