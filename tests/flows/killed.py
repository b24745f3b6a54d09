"""A task that is killed right after it saved, and its next attempt; a token that is not to be seen."""

import json
import os
import signal

from metaflow import FlowSpec, Parameter, checkpoint, current, huggingface_hub, model, retry, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class KilledFlow(FlowSpec):
    token = Parameter("token", default="")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        found = sorted(os.listdir(current.checkpoint.directory))
        show("found", [found, current.checkpoint.info and current.checkpoint.info.metadata])
        if current.retry_count == 0:
            for number in range(3):
                with open(os.path.join(current.checkpoint.directory, f"part{number}"), "wb") as file:
                    file.write(os.urandom(1 << 20))
                current.checkpoint.save(metadata={"number": number})
            os.kill(os.getpid(), signal.SIGKILL)
        self.next(self.end)

    @huggingface_hub(cache_scope="flow")
    @model(best_effort_load=True, load=["nothing"])
    @step
    def end(self):
        show("loaded", list(current.model.loaded))
        hub = current.huggingface_hub
        try:
            reference = hub.snapshot_download(repo_id="org/secret", token=self.token or False)
            show("secret", [reference["metadata"]["private"], json.dumps(reference).count(self.token or "none")])
        except Exception as error:
            show("refused", type(error).__name__)


if __name__ == "__main__":
    KilledFlow()
