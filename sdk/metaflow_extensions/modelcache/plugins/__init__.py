"""What Metaflow finds here: the step decorators."""

STEP_DECORATORS_DESC = [
    ("checkpoint", ".checkpoint.CheckpointDecorator"),
    ("model", ".model.ModelDecorator"),
    ("huggingface_hub", ".huggingface_hub.HuggingfaceHubDecorator"),
]
