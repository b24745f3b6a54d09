"""All of it together: a base model from the hub, training that is killed on purpose and goes on from its last checkpoint, a model.

    python -m examples.run fine_tune
    python -m examples.run fine_tune_load

The "model" is a straight line that learns from five points, so that the example runs anywhere. What it does around it is real.
"""

from metaflow import FlowSpec, Parameter, checkpoint, current, huggingface_hub, model, retry, step
import json
import os
import signal

POINTS = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0), (4.0, 9.0)]  # y = 2x + 1
RATE = 0.02


def read(folder):
    with open(os.path.join(folder, "line.json")) as file:
        return json.load(file)


def write(folder, line):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "line.json"), "w") as file:
        json.dump(line, file)


def learn(line):
    """One epoch; returns its loss."""
    errors = [line["slope"] * x + line["offset"] - y for x, y in POINTS]
    line["slope"] -= RATE * sum(error * x for error, (x, _) in zip(errors, POINTS))
    line["offset"] -= RATE * sum(errors)
    return sum(error * error for error in errors) / len(errors)


class FineTuneFlow(FlowSpec):
    base = Parameter("base", help="Repo of the base model", default="demo/line")
    epochs = Parameter("epochs", help="Epochs to train", default=60)

    @huggingface_hub(cache_scope="flow")
    @step
    def start(self):
        self.base_model = current.huggingface_hub.snapshot_download(repo_id=self.base, allow_patterns=["*.json"])
        print("Base model:", self.base, "at commit", self.base_model["metadata"]["commit"])
        self.next(self.train)

    @retry(times=2, minutes_between_retries=0)
    @checkpoint
    @model(load="base_model")
    @step
    def train(self):
        if current.checkpoint.is_loaded:
            line = read(current.checkpoint.directory)
            print("Goes on after epoch", line["epoch"])
        else:
            line = {**read(current.model.loaded["base_model"]), "epoch": -1}
            print("Begins with the base model")
        for epoch in range(line["epoch"] + 1, self.epochs):
            loss = learn(line)
            line["epoch"] = epoch
            if epoch % 10 == 9:
                write(current.checkpoint.directory, line)
                current.checkpoint.save(metadata={"epoch": epoch, "loss": loss})
            if epoch == 35 and current.retry_count == 0:
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        write("./tuned", line)
        self.tuned = current.model.save("./tuned", label="tuned", metadata={"loss": loss, "base": self.base_model["key"]})
        print("Trained to a loss of %.4f" % loss)
        self.next(self.evaluate)

    @model(load=["tuned"])
    @step
    def evaluate(self):
        line = read(current.model.loaded["tuned"])
        print("y = %.1fx + %.1f, after epoch %d" % (line["slope"], line["offset"], line["epoch"]))
        self.next(self.end)

    @step
    def end(self):
        print("Key:", self.tuned["key"])


if __name__ == "__main__":
    FineTuneFlow()
