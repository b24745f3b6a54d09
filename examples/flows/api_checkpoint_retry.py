"""A retry begins with the last checkpoint of the attempt before it.

    python -m examples.run api_checkpoint_retry
"""

from metaflow import FlowSpec, checkpoint, current, retry, step
import os


def create_model(parameters, checkpoint_path):
    """The epochs it has seen stand for a model."""
    if checkpoint_path is None:
        return []
    with open(os.path.join(checkpoint_path, "epochs.txt")) as file:
        return file.read().split()


class RetriedFlow(FlowSpec):
    @step
    def start(self):
        self.parameters, self.epochs = {}, 4
        self.next(self.train)

    @retry(times=3)
    @checkpoint
    @step
    def train(self):
        checkpoint_path = None
        if current.checkpoint.is_loaded:
            print("Loaded checkpoint from the previous attempt")
            checkpoint_path = current.checkpoint.directory

        model = create_model(self.parameters, checkpoint_path = checkpoint_path)
        for i in range(self.epochs):
            if str(i) in model:
                continue
            model.append(str(i))
            with open(os.path.join(current.checkpoint.directory, "epochs.txt"), "w") as file:
                file.write(" ".join(model))
            current.checkpoint.save()
            if i == current.retry_count < 2:
                raise RuntimeError("This attempt fails on purpose")
        print("Attempt", current.retry_count, "has seen", model)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    RetriedFlow()
