"""transformers' Trainer: `python hf_trainer.py OUT`. Resumes from the newest checkpoint in OUT, as its own scripts do."""

from __future__ import annotations

import sys

import pace
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        pace.step(state.global_step)


out = sys.argv[1]
set_seed(7)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config)
ids = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
arguments = TrainingArguments(
    out,
    max_steps=pace.STEPS,
    save_steps=pace.SAVE_EVERY,
    save_total_limit=2,
    logging_steps=1,
    per_device_train_batch_size=4,
    seed=7,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids], callbacks=[Pace()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
pace.end(trainer.state.global_step, losses[-1], model.state_dict().values())
