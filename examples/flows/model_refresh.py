"""The flow that `model_load_event` reacts to.

    python -m examples.run model_refresh
"""

from metaflow import FlowSpec, step, model, current


class ModelRefreshFlow(FlowSpec):

    @model
    @step
    def start(self):
        with open("refreshed.txt", "w") as file:
            file.write("weights")
        self.model_reference = current.model.save("refreshed.txt", label="refreshed")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ModelRefreshFlow()
