"""A trainer that knows nothing of Metaflow, in a folder that is watched; its task is killed, and its folder lost, in the first attempt."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from metaflow import FlowSpec, Parameter, checkpoint, current, retry, step


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


def train(*arguments):
    ran = subprocess.run([sys.executable, "-m", "tests.trainer", "out", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    return ran.stdout.split()


class WatchedFlow(FlowSpec):
    kill = Parameter("kill", default=1)
    steps = Parameter("steps", default="30")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint(watch="out", load_policy="eager")
    @step
    def start(self):
        show("found", [current.retry_count, sorted(os.listdir("out")), sorted(os.listdir(current.checkpoint.directory))])
        if self.kill and current.retry_count == 0:
            train("--kill", "25")
            (watched,) = current.checkpoint.watches
            while watched.status().captured_count < 2:
                time.sleep(0.1)  # a status sends no events
            shutil.rmtree("out")
            os.kill(os.getpid(), signal.SIGKILL)
        show("trained", train("--steps", self.steps))
        current.checkpoint.watches[0].stop(3)  # nobody writes any more: shorter than the trainer's files have to be quiet for
        shutil.rmtree("out")  # as on another node
        self.next(self.by_hand)

    @checkpoint
    @step
    def by_hand(self):
        watched = current.checkpoint.watch("mine", keep=1)
        for number in (10, 20) if self.kill else ():
            subprocess.run([sys.executable, "-m", "tests.trainer", "mine", "--steps", str(number)], check=True)
        pending = watched.stop(3).pending
        show("kept", [watched.name, [each["metadata"]["step"] for each in current.checkpoint.list("mine")], pending])
        self.next(self.end)

    @step
    def end(self):
        show("of start", [[each["name"], each["metadata"]["step"], each["attempt"]] for each in self._task_checkpoints_of("start")])

    def _task_checkpoints_of(self, name):
        from metaflow import Checkpoint, Flow

        (task,) = Flow(current.flow_name)[current.run_id][name]
        return Checkpoint().list(task=task)


if __name__ == "__main__":
    WatchedFlow()
