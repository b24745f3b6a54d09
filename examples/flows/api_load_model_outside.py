"""`load_model` outside of any flow: of a step of a run that is over, and of its last step.

    python -m examples.run api_load_model
    python -m examples.run api_load_model_outside MyFlow/...
"""

from metaflow import Run
from metaflow import load_model
import os
import sys

run = Run(sys.argv[1])

task_model_ref = run["train"].task.data.my_model
load_model(task_model_ref, "./local/path/to/model")

model_ref = run.data.my_model
load_model(model_ref, "./local/path/to/model")
print("Loaded:", os.listdir("./local/path/to/model"))
