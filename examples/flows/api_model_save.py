"""`current.model.save` with a label and metadata, and `@model(load=...)` with a name.

    python -m examples.run api_model_save
"""

from metaflow import FlowSpec, current, model, step
import os


class SaveFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.train)

    @model
    @step
    def train(self):
        path_to_my_model = "./trained"
        os.makedirs(path_to_my_model, exist_ok=True)
        with open(os.path.join(path_to_my_model, "weights.txt"), "w") as file:
            file.write("0.5")

        self.my_model = current.model.save(
            path_to_my_model,
            label="my_model",
            metadata={
                "epochs": 10,
                "batch-size": 32,
                "learning-rate": 0.001,
            }
        )
        self.next(self.test)

    @model(load="my_model")
    @step
    def test(self):
        print(os.listdir(current.model.loaded["my_model"]))
        print("Metadata:", current.model.loaded.info["my_model"]["metadata"])
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    SaveFlow()
