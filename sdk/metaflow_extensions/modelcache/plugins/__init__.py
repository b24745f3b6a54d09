"""What Metaflow finds here: the step decorators. None where a code package came without the SDK: `import metaflow` works there too."""

from importlib.util import find_spec

STEP_DECORATORS_DESC = [
    ("checkpoint", ".checkpoint.CheckpointDecorator"),
    ("model", ".model.ModelDecorator"),
    ("huggingface_hub", ".huggingface_hub.HuggingfaceHubDecorator"),
]
if find_spec("modelcache") is None:
    STEP_DECORATORS_DESC = []
