"""Saving models: a file, and a folder. What `save` returns is a small dict, kept as an artifact.

    python -m examples.run model_save_basic
"""

from metaflow import FlowSpec, step, model, current
import os


class ModelSavingFlow(FlowSpec):

    @model
    @step
    def start(self):
        import uuid
        with open("model.h5", "w") as file:
            file.write(f"weights {uuid.uuid4()}")

        self.basic_model = current.model.save(
            "model.h5",
            label="basic_model",
            metadata={
                "version": "1.0",
                "accuracy": 0.95
            }
        )

        os.makedirs("./model_directory", exist_ok=True)
        for name in ("config.json", "weights.txt"):
            with open(os.path.join("./model_directory", name), "w") as file:
                file.write(f"{name} {uuid.uuid4()}")

        self.directory_model = current.model.save(
            "./model_directory",
            label="keras_model",
            metadata={
                "loss": "2.0",
            }
        )

        # The key alone loads it, too, anywhere and at any later time.
        self.model_key = self.directory_model["key"]
        print(f"Model key: {self.model_key}")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ModelSavingFlow()
