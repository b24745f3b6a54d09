"""A key is a string, so it can be a parameter. The keys of all models: `modelcache ls --store`.

    python -m examples.run model_load_basic_key
    python -m examples.run model_load_key_param run --model-key mf.models/models/artifacts/basic_model_...
"""

from metaflow import FlowSpec, step, model, Parameter, current


class ModelConsumerFlow(FlowSpec):
    model_key = Parameter('model-key',
                         help="Key of the model to load")

    @model(load=[("model_key", "./models/consumer")])
    @step
    def start(self):
        import os
        print("Model files:", os.listdir("./models/consumer"))
        print("Loaded model from pathspec: %s" % current.model.loaded.info["model_key"]["pathspec"])
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ModelConsumerFlow()
