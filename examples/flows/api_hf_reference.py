"""`current.huggingface_hub.snapshot_download`: a reference in one step, the files in the next.

    python -m examples.run api_hf_reference
"""

from metaflow import FlowSpec, current, huggingface_hub, model, step
import os


class ReferenceFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.pull_model_from_huggingface)

    @huggingface_hub
    @step
    def pull_model_from_huggingface(self):
        # Asked for once: the second run finds it in the store, and does not ask the hub.
        self.model_id = "mistralai/Mistral-7B-Instruct-v0.1"
        self.llama_model = current.huggingface_hub.snapshot_download(
            repo_id=self.model_id,
            allow_patterns=["*.safetensors", "*.json", "tokenizer.*"],
        )
        self.next(self.train)

    @model(load=["llama_model"])
    @step
    def train(self):
        print("Contents:", sorted(os.listdir(current.model.loaded["llama_model"])))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ReferenceFlow()
