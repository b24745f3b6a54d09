"""`load_model`: any reference, in a step without a decorator.

    python -m examples.run api_load_model
"""

from metaflow import FlowSpec, step
from metaflow import current, model
import os


class MyFlow(FlowSpec):
    @step
    def start(self):
        os.makedirs("./path/to/trained/model", exist_ok=True)
        with open("./path/to/trained/model/weights.txt", "w") as file:
            file.write("0.5")
        self.next(self.train)

    @model
    @step
    def train(self):
        self.my_model = current.model.save(
            "./path/to/trained/model",
            label="trained_model"
        )
        self.next(self.evaluate)

    @step
    def evaluate(self):
        from metaflow import load_model
        load_model(self.my_model, "./tmp/loaded_model")
        print("Loaded:", os.listdir("./tmp/loaded_model"))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    MyFlow()
