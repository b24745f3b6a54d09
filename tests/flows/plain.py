"""A flow that uses none of the decorators."""

from metaflow import FlowSpec, step


class PlainFlow(FlowSpec):
    @step
    def start(self):
        from metaflow import load_model

        load_model(open("key").read(), "./loaded")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    PlainFlow()
