"""A loop of one's own with Accelerate's `save_state` and automatic names: `python accelerate_loop.py OUT`."""

from __future__ import annotations

import os
import sys

import pace
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed


class Progress:
    step = 0
    loss = 0.0

    def state_dict(self):
        return {"step": self.step, "loss": self.loss}

    def load_state_dict(self, state):
        self.step, self.loss = state["step"], state["loss"]


out = sys.argv[1]
set_seed(7)
saved = os.listdir(f"{out}/checkpoints") if os.path.isdir(f"{out}/checkpoints") else []
last = max([int(name.rpartition("_")[2]) for name in saved], default=-1)
project = ProjectConfiguration(out, automatic_checkpoint_naming=True, total_limit=2, iteration=last + 1)
accelerator = Accelerator(cpu=True, project_config=project)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
progress = Progress()
accelerator.register_for_checkpointing(progress)
if last >= 0:
    accelerator.load_state(f"{out}/checkpoints/checkpoint_{last}")
while progress.step < pace.STEPS:
    batch = torch.randn(4, 8)
    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    progress.loss = loss.item()
    pace.step(progress.step)
    if progress.step % pace.SAVE_EVERY == 0:
        accelerator.save_state()
pace.end(progress.step, progress.loss, accelerator.unwrap_model(model).state_dict().values())
