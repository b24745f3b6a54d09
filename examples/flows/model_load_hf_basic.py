"""A repo of the hub goes through `@model` like anything that was saved.

    python -m examples.run model_load_hf_basic
"""

from metaflow import FlowSpec, step, model, current, huggingface_hub
import os


class HFModelFlow(FlowSpec):

    @huggingface_hub
    @step
    def start(self):
        self.hf_model = current.huggingface_hub.snapshot_download(
            repo_id="bert-base-uncased"
        )
        self.next(self.end)

    @model(load=["hf_model"])  # the artifact's name
    @step
    def end(self):
        model_path = current.model.loaded["hf_model"]
        print("Directory contents of hf_model: %s" % os.listdir(model_path))


if __name__ == "__main__":
    HFModelFlow()
