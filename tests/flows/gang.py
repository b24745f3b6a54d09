"""A gang of two nodes that fails once. Each has a daemon of its own, and its next attempt runs on the other's: SOCKETS names them."""

import json
import os
import sys

from metaflow import FlowSpec, checkpoint, current, parallel, retry, step


def argument(name):
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else 0


os.environ["MODELCACHE_SOCKET"] = os.environ["SOCKETS"].split(":")[(argument("--split-index") + argument("--retry-count")) % 2]


def show(word, value):
    print(f"{word} {json.dumps(value, sort_keys=True, default=str)}", flush=True)


class GangFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.gang, num_parallel=2)

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @parallel
    @step
    def gang(self):
        rank, info = current.parallel.node_index, current.checkpoint.info
        show("gang", [rank, current.retry_count, info and info.metadata["rank"], current.checkpoint.task_identifier])
        reference = current.checkpoint.save(__file__, metadata={"rank": rank})
        show("key", [reference["pathspec"], reference["key"]])
        if rank == 0 and current.retry_count == 0:
            raise RuntimeError("the gang fails once")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    GangFlow()
