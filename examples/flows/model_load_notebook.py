"""Outside of any flow: a notebook, a server.

    python -m examples.run model_load_basic_key
    python -m examples.run model_load_notebook
"""

import os
from metaflow import Flow
from metaflow import load_model
run = Flow('ModelSavingFlow').latest_successful_run
upstream_model = run.data.basic_model
load_model(upstream_model, path="./models/notebook-load")
print(
    "Model created for pathspec", run.data.basic_model["pathspec"]
)
print("Model files:", os.listdir("./models/notebook-load"))
