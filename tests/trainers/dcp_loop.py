"""torch.distributed.checkpoint, a folder a step: `python dcp_loop.py OUT`."""

from __future__ import annotations

import os
import shutil
import sys

import pace
import torch
import torch.distributed.checkpoint as dcp

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
velocity = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
step, loss = 0, torch.zeros(())
state = {"model": model.state_dict(), "velocity": velocity, "random": torch.get_rng_state(), "step": torch.tensor(0), "loss": loss}
saved = sorted(int(name.partition("-")[2]) for name in os.listdir(out) if os.path.exists(f"{out}/{name}/.metadata"))
if saved:
    dcp.load(state, checkpoint_id=f"{out}/step-{saved[-1]}", no_dist=True)
    model.load_state_dict(state["model"])
    torch.set_rng_state(state["random"])
    step, loss = int(state["step"]), state["loss"]
while step < pace.STEPS:
    batch = torch.randn(4, 8)
    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            velocity[name].mul_(0.9).add_(parameter.grad)
            parameter.sub_(velocity[name], alpha=0.01)
    step += 1
    pace.step(step)
    if step % pace.SAVE_EVERY == 0:
        state = {"model": model.state_dict(), "velocity": velocity, "random": torch.get_rng_state(), "step": torch.tensor(step)}
        dcp.save({**state, "loss": loss.detach()}, checkpoint_id=f"{out}/step-{step}", no_dist=True)
        shutil.rmtree(f"{out}/step-{step - 2 * pace.SAVE_EVERY}", ignore_errors=True)
pace.end(step, loss.item(), model.state_dict().values())
