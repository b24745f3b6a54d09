"""What fine_tune.py saved, in a program that is no flow.

    python -m examples.run fine_tune
    python -m examples.run fine_tune_load
"""

from metaflow import Flow, load_model
import json

run = Flow("FineTuneFlow").latest_successful_run
load_model(run.data.tuned, "./tuned-outside")
with open("./tuned-outside/line.json") as file:
    line = json.load(file)
print("Made by", run.data.tuned["pathspec"])
print("At x = 10, y is about %.0f" % (line["slope"] * 10 + line["offset"]))
