"""Lightning with its ModelCheckpoint: `python lightning_fit.py OUT [copy]`. Resumes from `last.ckpt`, a link or a copy, if there is one."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import lightning
import pace
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def training_step(self, batch, _):
        (batch,) = batch
        self.loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
        return self.loss

    def on_train_batch_end(self, *_):
        pace.step(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


out = sys.argv[1]
save_last = True if sys.argv[2:] == ["copy"] else "link"
lightning.seed_everything(7, verbose=False)
# The same batch every time: in the middle of an epoch Lightning begins again with the data, and goes on with everything else.
data = torch.utils.data.TensorDataset(torch.randn(4, 8).repeat(pace.STEPS, 1))
module = Module()
trainer = lightning.Trainer(
    accelerator="cpu",
    max_steps=pace.STEPS,
    callbacks=[ModelCheckpoint(out, every_n_train_steps=pace.SAVE_EVERY, save_top_k=2, monitor="step", mode="max", save_last=save_last)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
last = os.path.join(out, "last.ckpt")
loader = torch.utils.data.DataLoader(data, batch_size=4)
trainer.fit(module, loader, ckpt_path=last if os.path.exists(last) else None, weights_only=False)
pace.end(trainer.global_step, module.loss.item(), module.state_dict().values())
