"""What another flow's latest run saved, found through Metaflow's client.

    python -m examples.run model_load_basic_key
    python -m examples.run model_load_client_api
"""

from metaflow import Flow, current, namespace, model, FlowSpec, step
from metaflow.client import Step, Task
import os


class InferenceFlow(FlowSpec):
    @step
    def start(self):
        run = Flow('ModelSavingFlow').latest_successful_run
        self.upstream_model = run.data.basic_model
        self.next(self.load_model)

    @model(load=["upstream_model"])
    @step
    def load_model(self):
        # Before the step began
        model_path = current.model.loaded["upstream_model"]
        print(f"Loaded via decorator to: {model_path} with contents: {os.listdir(model_path)}")

        # And once more, as files of its own
        manual_path = current.model.load(
            self.upstream_model,
            path="./manual_load"
        )
        print(f"Loaded manually to: {manual_path} with contents: {os.listdir(manual_path)}")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    InferenceFlow()
