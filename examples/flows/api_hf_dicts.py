"""`@huggingface_hub(load=...)`: dicts of `snapshot_download`'s arguments, all forms mixed, and what `loaded` answers.

    python -m examples.run api_hf_dicts
"""

from metaflow import FlowSpec, current, huggingface_hub, step
import os


class DictsFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.finetune_model)

    @huggingface_hub(load=[
        {
            "repo_id": "mistralai/Mistral-7B-Instruct-v0.1",
        },
        {
            "repo_id": "myorg/mistral-lora",
            "repo_type": "model",
        },
    ])
    @step
    def finetune_model(self):
        path_to_model = current.huggingface_hub.loaded["mistralai/Mistral-7B-Instruct-v0.1"]
        print("Contents:", sorted(os.listdir(path_to_model)))
        self.next(self.my_step)

    @huggingface_hub(load=["mistralai/Mistral-7B-Instruct-v0.1"])
    @step
    def my_step(self):
        model_path = current.huggingface_hub.loaded["mistralai/Mistral-7B-Instruct-v0.1"]

        # `loaded` is a mapping: `in`, len, iteration, and a KeyError that says what is there
        if "mistralai/Mistral-7B-Instruct-v0.1" in current.huggingface_hub.loaded:
            print("Model is loaded!")

        print("Commit:", len(current.huggingface_hub.loaded.info["mistralai/Mistral-7B-Instruct-v0.1"]["metadata"]["commit"]), "digits")
        print("Files:", len(os.listdir(model_path)))
        self.next(self.another_step)

    @huggingface_hub(load=[
        ("mistralai/Mistral-7B-Instruct-v0.1", "./custom/path"),  # with a path
        {
            "repo_id": "org/model-name",
            "force_download": True,  # asks the hub now, and is what everybody finds from now on
            "repo_type": "dataset"
        }
    ])
    @step
    def another_step(self):
        print("Loaded:", sorted(current.huggingface_hub.loaded))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    DictsFlow()
