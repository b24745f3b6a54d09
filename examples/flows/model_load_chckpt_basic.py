"""So does a checkpoint.

    python -m examples.run model_load_chckpt_basic
"""

from metaflow import FlowSpec, step, model, current, checkpoint
import os
import json


class CheckpointFlow(FlowSpec):

    @checkpoint
    @step
    def start(self):
        os.makedirs("./checkpoint_dir", exist_ok=True)
        with open("./checkpoint_dir/config.json", "w") as file:
            json.dump({"layers": 2}, file)
        with open("./checkpoint_dir/weights.txt", "w") as file:
            file.write("0.5 0.25")

        self.checkpoint_foo = current.checkpoint.save(
            "./checkpoint_dir",
            metadata={
                "version": "2.0",
            }
        )
        self.next(self.end)

    @model(load=["checkpoint_foo"])  # the artifact's name
    @step
    def end(self):
        model_path = current.model.loaded["checkpoint_foo"]
        print("Directory contents of hf_model: %s" % os.listdir(model_path))


if __name__ == "__main__":
    CheckpointFlow()
