"""A plain loop that writes one file a checkpoint: `python plain_loop.py OUT safetensors|torch`."""

from __future__ import annotations

import contextlib
import os
import re
import sys

import pace
import torch
from safetensors.torch import load_file, save_file

out, kind = sys.argv[1:]
suffix = "safetensors" if kind == "safetensors" else "pt"
os.makedirs(out, exist_ok=True)
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
velocity = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
step, loss = 0, torch.zeros(())


def place(number: int) -> str:
    return f"{out}/model-step{number}.{suffix}"


saved = sorted(int(found.group(1)) for found in map(re.compile(rf"model-step(\d+)\.{suffix}").fullmatch, os.listdir(out)) if found)
if saved:
    state = load_file(place(saved[-1])) if suffix == "safetensors" else torch.load(place(saved[-1]))
    model.load_state_dict({name: state[f"model.{name}"] for name in velocity})
    velocity = {name: state[f"velocity.{name}"] for name in velocity}
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
        state = {"random": torch.get_rng_state(), "step": torch.tensor(step), "loss": loss.detach()}
        state |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        state |= {f"velocity.{name}": tensor for name, tensor in velocity.items()}
        save_file(state, place(step)) if suffix == "safetensors" else torch.save(state, place(step))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place(step - 2 * pace.SAVE_EVERY))
pace.end(step, loss.item(), model.state_dict().values())
