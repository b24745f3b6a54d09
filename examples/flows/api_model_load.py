"""`current.model.load`: by key, and by reference; `@model(load=...)` with a list of names. `current.model` is there in steps with `@model`.

    python -m examples.run api_model_load
"""

from metaflow import FlowSpec, checkpoint, current, model, step
import os


class ExplicitFlow(FlowSpec):
    @checkpoint
    @model
    @step
    def start(self):
        with open("weights.txt", "w") as file:
            file.write("0.5")
        self.checkpoint_key = current.checkpoint.save("weights.txt")["key"]
        self.chckpt_key = self.checkpoint_key
        self.model = current.model.save("weights.txt")
        self.model_key = self.model["key"]
        self.next(self.train)

    @model
    @step
    def train(self):
        checkpoint_path = current.model.load(
            self.checkpoint_key,
        )
        model_path = current.model.load(
            self.model,
        )
        print("Contents:", os.listdir(checkpoint_path), os.listdir(model_path))
        self.next(self.test)

    @step
    def test(self):
        self.next(self.mid_step)

    @model(load=["model_key", "chckpt_key"])
    @step
    def mid_step(self):
        import os
        os.listdir(current.model.loaded["model_key"])
        os.listdir(current.model.loaded["chckpt_key"])
        print("Both:", {name: info["type"] for name, info in sorted(current.model.loaded.info.items())})
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ExplicitFlow()
