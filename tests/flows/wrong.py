"""Decorators that are told something that makes no sense; which, says the environment."""

import os

from metaflow import FlowSpec, checkpoint, huggingface_hub, model, step

KIND = os.environ["KIND"]
DECORATORS = {
    "policy": checkpoint(load_policy="always"),
    "scope": huggingface_hub(cache_scope="planet"),
    "repos": huggingface_hub(load="org/name"),
    "argument": huggingface_hub(load=[{"repo_id": "org/name", "patterns": "*"}]),
    "artifacts": model(load=("a", "./b")),
    "card": model(show_card="no"),
    "folder": checkpoint(temp_dir_root=3),
    "fine": checkpoint(),
}


class WrongFlow(FlowSpec):
    @DECORATORS[KIND]
    @step
    def start(self):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    WrongFlow()
