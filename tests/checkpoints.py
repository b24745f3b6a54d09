"""Checkpoints as trainers write them, in small: the names, markers and formats of each layout, without the trainers."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

Files = Mapping[str, bytes]


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def archive(data: bytes = b"weights") -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("archive/data.pkl"), data)  # dated 1980, always
    return made.getvalue()


def plain(value: object) -> bytes:
    return json.dumps(value).encode()


def hf_trainer(step: int, data: bytes = b"") -> dict[str, bytes]:
    unit = f"checkpoint-{step}"
    state = {"global_step": step, "epoch": step / 100, "log_history": [{"step": step, "loss": 1 / step}, {"eval_loss": 2 / step}]}
    return {
        f"{unit}/model.safetensors": safetensors(data or b"%d" % step * 1000),
        f"{unit}/optimizer.pt": archive(),
        f"{unit}/rng_state.pth": archive(),
        f"{unit}/trainer_state.json": plain(state),
    }


def accelerate(number: int) -> dict[str, bytes]:
    unit = f"checkpoints/checkpoint_{number}"
    return {f"{unit}/{name}": archive() for name in ("optimizer.bin", "random_states_0.pkl", "random_states_1.pkl")} | {
        f"{unit}/model.safetensors": safetensors(b"m")
    }


# By layout: the unit, its step, its files and those beside it.
WHOLE: dict[str, tuple[str, int | None, Files]] = {
    "llamafactory": ("checkpoint-7", 7, hf_trainer(7) | {"checkpoint-7/CHECKPOINT_COMPLETE": b""}),
    "hf-trainer": ("checkpoint-100", 100, hf_trainer(100)),
    "accelerate": ("checkpoints/checkpoint_3", 3, accelerate(3)),
    "lightning-sharded": (
        "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt",
        20,
        {
            f"lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt/{name}": archive()
            for name in ("meta.pt", ".metadata", "__0_0.distcp")
        },
    ),
    "lightning-deepspeed": (
        "epoch=1-step=20.ckpt",
        20,
        {
            "epoch=1-step=20.ckpt/latest": b"checkpoint",
            "epoch=1-step=20.ckpt/checkpoint/mp_rank_00_model_states.pt": archive(),
            "epoch=1-step=20.ckpt/checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt": archive(),
        },
    ),
    "dcp": ("step-500", 500, {f"step-500/{name}": b"x" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")}),
    "deepspeed": (
        "global_step40",
        40,
        {
            "latest": b"global_step40",
            "global_step40/mp_rank_00_model_states.pt": archive(),
            "global_step40/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": archive(),
            "global_step40/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": archive(),
        },
    ),
    "megatron-dist": (
        "iter_0000100",
        100,
        {"latest_checkpointed_iteration.txt": b"100"}
        | {f"iter_0000100/{name}": b"{}" for name in ("metadata.json", ".metadata", "__0_0.distcp", "common.txt")},
    ),
    "megatron": (
        "iter_0000200",
        200,
        {"latest_checkpointed_iteration.txt": b"200", "iter_0000200/mp_rank_00/model_optim_rng.pt": archive()},
    ),
    "orbax": ("ckpt/12", 12, {"ckpt/12/_CHECKPOINT_METADATA": b"{}", "ckpt/12/default/_METADATA": b"{}", "ckpt/12/default/d/0": b"x"}),
    "torchsnapshot": ("run/5", 5, {"run/5/.snapshot_metadata": b"x", "run/5/0/w": b"x"}),
    "lerobot": (
        "checkpoints/000300",
        300,
        {
            "checkpoints/000300/pretrained_model/model.safetensors": safetensors(b"m"),
            "checkpoints/000300/training_state/training_step.json": plain({"step": 300}),
        },
    ),
    "dlrover": ("9", 9, {"dlrover_latest.txt": b"9", "9/rank_0.pt": archive(), "9/rank_1.pt": archive()}),
    "nvrx": ("iter_0000050_0_local.pt", 50, {"iter_0000050_0_local.pt": archive()}),
    "lightning": ("checkpoints/epoch=0-step=30.ckpt", 30, {"checkpoints/epoch=0-step=30.ckpt": archive()}),
    "keras": ("model_05.keras", 5, {"model_05.keras": archive()}),
    "single-file": ("model-17.safetensors", 17, {"model-17.safetensors": safetensors(b"m")}),
    "quiet": ("snapshot8", 8, {"snapshot8/weights.dat": b"x", "train.log": b"started", "runs/events.out.tfevents.1": b"x"}),
}


def write(folder: Path, files: Files) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def make_old(folder: Path) -> None:
    """As far as stamps can be set: a file's last write was long ago. Its ctime is now, as after a copy."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.utime(os.path.join(place, name), (1, 1), follow_symlinks=False)
