"""One process of a job that loads states from elsewhere: `python accelerate_remote.py SOURCE...`, with torchrun's variables."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pace
import torch
from accelerate import Accelerator

from modelcache.accelerate import AcceleratorState, accelerator_load_state


@dataclass
class Progress(AcceleratorState):
    step: int = 0
    loss: float = 0.0


for source in sys.argv[1:]:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    accelerator_load_state(accelerator, source)
    print("rank", accelerator.process_index, "of", accelerator.num_processes, "local", accelerator.is_local_main_process)
    pace.end(progress.step, progress.loss, accelerator.unwrap_model(model).state_dict().values())
accelerator.end_training()
