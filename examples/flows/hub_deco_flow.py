"""Repos that a step always needs: named in the decorator, there when the step begins.

    python -m examples.run hub_deco_flow
"""

from metaflow import FlowSpec, step, huggingface_hub, current
import os

# The documented flow has one more line here, @pypi_base(packages={"huggingface-hub": "0.16.4"}), which makes Metaflow build an
# environment from a package index. No package is needed: the daemon asks the hub, and the SDK is standard library only.


class SimpleHFFlow(FlowSpec):

    # Without a path: a shared, read-only folder, the same for every task on the node.
    @huggingface_hub(load=["bert-base-uncased"])
    @step
    def start(self):
        import os
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")
        self.next(self.load_to_path)

    # With a path: private files that the step may change.
    @huggingface_hub(load=[("bert-base-uncased", "./model_directory")])
    @step
    def load_to_path(self):
        import os
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")
        self.next(self.end)

    # With a dict: whatever `snapshot_download` takes.
    @huggingface_hub(load=[
        {
            "repo_id": "bert-base-uncased",
            "allow_patterns": ["*.json", "tokenizer.txt"],
            "repo_type": "model"
        },
    ])
    @step
    def end(self):
        model_path = current.huggingface_hub.loaded["bert-base-uncased"]
        print(f"Model loaded at: {model_path}")
        print(f"Contents: {os.listdir(model_path)}")


if __name__ == "__main__":
    SimpleHFFlow()
