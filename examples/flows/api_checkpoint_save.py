"""`current.checkpoint.save`: every so many epochs what is in `current.checkpoint.directory`; and what `list` finds.

    python -m examples.run api_checkpoint_save
"""

from metaflow import Checkpoint, FlowSpec, checkpoint, current, step
import os


def create_model(parameters, checkpoint_path):
    return Model(parameters["rate"])


class Model:
    def __init__(self, rate):
        self.rate, self.weight = rate, 0.0

    def train(self, dataset):
        self.weight += self.rate * (sum(dataset) / len(dataset) - self.weight)
        return abs(sum(dataset) / len(dataset) - self.weight)

    def save(self, directory):
        with open(os.path.join(directory, "weight.txt"), "w") as file:
            file.write(repr(self.weight))


class CheckpointedFlow(FlowSpec):
    @step
    def start(self):
        self.parameters, self.dataset, self.epochs = {"rate": 0.5}, [1.0, 2.0, 3.0], 21
        self.next(self.train)

    @checkpoint
    @step
    def train(self):
        model = create_model(self.parameters, checkpoint_path = None)
        for i in range(self.epochs):
            loss = model.train(self.dataset)
            if i % 10 == 0:
                model.save(
                    current.checkpoint.directory,
                )
                # Goes on as soon as this node has a copy; the store gets it while the next epochs run.
                self.latest_checkpoint = current.checkpoint.save(
                    name="epoch_checkpoint",
                    metadata={
                        "epoch": i,
                        "loss": loss,
                    }
                )
        print("Epochs:", [each["metadata"]["epoch"] for each in current.checkpoint.list()])

        best = current.checkpoint.save(name="best", latest=False)
        found = Checkpoint().list(name="best")
        elsewhere = Checkpoint().list(task="anotherflow/somerunid/somestep/sometask", name="best")
        everything = Checkpoint().list()
        print("Best:", [each["key"] for each in found] == [best["key"]], "elsewhere:", len(elsewhere), "in all:", len(everything))
        self.next(self.end)

    @step
    def end(self):
        print("Last:", self.latest_checkpoint["name"], self.latest_checkpoint["metadata"]["epoch"])


if __name__ == "__main__":
    CheckpointedFlow()
