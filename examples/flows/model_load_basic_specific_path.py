"""With a path the step gets private files there, and the path comes back as it was given.

    python -m examples.run model_load_basic_specific_path
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

        self.next(self.end)

    @model(load=[("basic_model", "./models/basic_model")])  # the artifact's name, and where to put it
    @step
    def end(self):
        model_directory = current.model.loaded["basic_model"]
        print("Model Path %s contains contents: %s" % (model_directory, os.listdir(model_directory)))
        print("Loaded model from pathspec: %s" % current.model.loaded.info["basic_model"]["pathspec"])


if __name__ == "__main__":
    ModelSavingFlow()
