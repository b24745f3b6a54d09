"""`@huggingface_hub(load=...)`: ids alone, and ids with paths.

    python -m examples.run api_hf_load
"""

from metaflow import FlowSpec, current, huggingface_hub, step
import os


class LoadFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.pull_model_from_huggingface)

    @huggingface_hub(load=["mistralai/Mistral-7B-Instruct-v0.1"])
    @step
    def pull_model_from_huggingface(self):
        path_to_model = current.huggingface_hub.loaded["mistralai/Mistral-7B-Instruct-v0.1"]
        print("Contents:", sorted(os.listdir(path_to_model)))
        self.next(self.finetune_model)

    @huggingface_hub(load=[("mistralai/Mistral-7B-Instruct-v0.1", "./my-directory"), ("myorg/mistral-lora", "./my-lora-directory")])
    @step
    def finetune_model(self):
        path_to_model = current.huggingface_hub.loaded["mistralai/Mistral-7B-Instruct-v0.1"]
        # the path as it was given; the files in it are the step's own
        print("Path:", path_to_model, "and", current.huggingface_hub.loaded["myorg/mistral-lora"])
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LoadFlow()
