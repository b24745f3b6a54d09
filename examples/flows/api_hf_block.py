"""`current.huggingface_hub.load`: a repo for as long as a block needs it.

    python -m examples.run api_hf_block
"""

from metaflow import FlowSpec, current, huggingface_hub, step
import os


def train_model(path):
    print("Trains with:", sorted(os.listdir(path)))


class torch:
    """Stands in for the real one, so that the example needs none."""

    @staticmethod
    def load(path):
        return os.path.basename(path)  # the patterns below leave that file out


class BlockFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.run_training)

    @huggingface_hub
    @step
    def run_training(self):
        # The node may drop the files after the block.
        with current.huggingface_hub.load(
            repo_id="google-bert/bert-base-uncased",
            allow_patterns=["*.bin"],
        ) as local_path:
            train_model(local_path)
        self.next(self.both)

    @huggingface_hub
    @step
    def both(self):
        ref = current.huggingface_hub.snapshot_download(
            repo_id="google-bert/bert-base-uncased",
            allow_patterns=["*.json"]
        )
        print("Reference to:", ref["metadata"]["allow_patterns"])

        with current.huggingface_hub.load(
            repo_id="google-bert/bert-base-uncased",
            allow_patterns=["*.json"]
        ) as local_path:
            my_model = torch.load(os.path.join(local_path, "model.bin"))
            print("In the block:", sorted(os.listdir(local_path)), my_model)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    BlockFlow()
