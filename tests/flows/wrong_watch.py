"""An argument that makes no sense: said before the first task."""

from metaflow import FlowSpec, checkpoint, step


class WrongWatchFlow(FlowSpec):
    @checkpoint(watch=5)
    @step
    def start(self):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    WrongWatchFlow()
