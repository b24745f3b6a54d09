"""Loading in the middle of a step, and not before it begins.

    python -m examples.run model_load_basic_explicit
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

    @model
    @step
    def end(self):
        model_directory = current.model.load(self.basic_model)
        print("Model Path %s contains contents: %s" % (model_directory, os.listdir(model_directory)))
        print("Loaded model from pathspec: %s" % self.basic_model["pathspec"])


if __name__ == "__main__":
    ModelSavingFlow()
