"""Steps that do nothing: what a decorator costs."""

# mypy: ignore-errors

from metaflow import FlowSpec, checkpoint, huggingface_hub, model, step


class EmptyFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.plain)

    @step
    def plain(self):
        self.next(self.with_checkpoint)

    @checkpoint
    @step
    def with_checkpoint(self):
        self.next(self.with_model)

    @model
    @step
    def with_model(self):
        self.next(self.with_huggingface_hub)

    @huggingface_hub
    @step
    def with_huggingface_hub(self):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    EmptyFlow()
