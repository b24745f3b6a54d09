"""`load_model` with a repo of the hub.

    python -m examples.run api_load_model_hf
"""

from metaflow import FlowSpec, current, huggingface_hub, step
import os


class DownloadFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.download_hf_model)

    @huggingface_hub
    @step
    def download_hf_model(self):
        self.hf_model = current.huggingface_hub.snapshot_download(
            repo_id="mistralai/Mistral-7B-Instruct-v0.1"
        )
        self.next(self.use_model)

    @step
    def use_model(self):
        from metaflow import load_model
        load_model(self.hf_model, "./tmp/mistral_model")
        print("Loaded:", sorted(os.listdir("./tmp/mistral_model")))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    DownloadFlow()
