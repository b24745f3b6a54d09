"""A repo that is known only when the flow runs: a reference to it is an artifact, which the next step loads.

    python -m examples.run hub_deco_flow_2
"""

from metaflow import FlowSpec, step, current, huggingface_hub, model
import os


class SimpleHFFlow(FlowSpec):

    @huggingface_hub
    @step
    def start(self):
        self.hf_model_reference = current.huggingface_hub.snapshot_download(
            repo_id="bert-base-uncased",
            allow_patterns=["*.json"]  # these files, and no others, are what the reference stands for
        )
        print(f"Model Reference saved with key : %s" % self.hf_model_reference["key"])
        self.next(self.end)

    @model(load="hf_model_reference")
    @step
    def end(self):
        print(f"Model loaded at: {current.model.loaded['hf_model_reference']}")
        print(f"Contents: {os.listdir(current.model.loaded['hf_model_reference'])}")


if __name__ == "__main__":
    SimpleHFFlow()
