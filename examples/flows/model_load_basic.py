"""Loading what an earlier step saved, by the name of the artifact that holds its reference.

    python -m examples.run model_load_basic
"""

from metaflow import FlowSpec, step, model, current
import os


class ModelSavingFlow(FlowSpec):

    @model
    @step
    def start(self):
        with open("model.h5", "w") as file:
            file.write("weights")

        self.basic_model = current.model.save(
            "model.h5",
            label="basic_model",
            metadata={
                "accuracy": 0.95
            }
        )

        self.next(self.end)

    @model(load=["basic_model"])  # the artifact's name
    @step
    def end(self):
        # A folder with the file in it, under the file's own name.
        model_directory = current.model.loaded["basic_model"]
        model_path = os.path.join(
            model_directory,
            "model.h5"
        )
        print("Model Path %s Exists: %s" % (model_path, os.path.exists(model_path)))
        print("Loaded model from pathspec: %s" % current.model.loaded.info["basic_model"]["pathspec"])


if __name__ == "__main__":
    ModelSavingFlow()
