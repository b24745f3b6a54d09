"""An artifact may hold a key instead of a whole reference.

    python -m examples.run model_load_basic_key
"""

from metaflow import FlowSpec, step, model, current
import os


class ModelSavingFlow(FlowSpec):

    @model
    @step
    def start(self):
        import uuid
        os.makedirs("./model_directory", exist_ok=True)
        for name in ("config.json", "weights.txt"):
            with open(os.path.join("./model_directory", name), "w") as file:
                file.write(f"{name} {uuid.uuid4()}")

        self.basic_model = current.model.save(
            "./model_directory",
            label="basic_model",
            metadata={
                "version": "1.0",
                "accuracy": 0.95
            }
        )
        self.model_key = self.basic_model["key"]

        self.next(self.end)

    @model(load=["model_key"])  # the artifact's name
    @step
    def end(self):
        model_directory = current.model.loaded["model_key"]
        print("Model Path %s contains contents:: %s" % (model_directory, os.listdir(model_directory)))
        print("Loaded model from pathspec: %s" % current.model.loaded.info["model_key"]["pathspec"])


if __name__ == "__main__":
    ModelSavingFlow()
