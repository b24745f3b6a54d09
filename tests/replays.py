"""Trainers that are too large to run here: what they write, file by file in their own order, read in their sources.

A replay's `save` is a generator: it writes one thing after the other and says after each what a watcher may make of the checkpoint:
OPEN, it is not complete and looks it; RACING, it is not complete and nothing in the folder says so, so only quiet keeps it from being
taken; DONE. Between two of them the real trainer computes, waits for other ranks, or is killed. `newest` is what its resume would load.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

OPEN, RACING, DONE = "open", "racing", "done"
PICKLE = b"\x80\x02}q\x00."  # of an empty dict


class Replay(ABC):
    """`source` names the package's version, its file and its functions."""

    source: str
    steps = (10, 20, 30)

    @abstractmethod
    def save(self, out: Path, step: int) -> Iterator[str]: ...

    @abstractmethod
    def newest(self, out: Path) -> Path | None:
        """The checkpoint that a resume loads."""

    @abstractmethod
    def unit(self, step: int) -> str: ...

    def remove(self, out: Path, step: int) -> None:
        """What it does with a checkpoint that is not wanted any more."""
        shutil.rmtree(out / self.unit(step))


class DeepSpeed(Replay):
    """ZeRO, two ranks. Nobody waits for rank 1 before rank 0 writes `latest`."""

    source = "deepspeed 0.19.8, runtime/engine.py: save_checkpoint, _save_checkpoint, _save_zero_checkpoint, _copy_recovery_script"

    def unit(self, step: int) -> str:
        return f"global_step{step}"

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / self.unit(step)
        made.mkdir()
        yield OPEN
        yield from torch_save(made / "mp_rank_00_model_states.pt", step)
        yield from torch_save(made / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", step)
        rank1 = torch_save(made / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", step + 1)
        yield next(rank1)  # it has begun, and is slow
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (out / script).write_text("print('weights')\n")
            os.chmod(out / script, 0o744)
            yield OPEN
        (out / "latest").write_text(self.unit(step))
        yield OPEN
        yield from rank1
        yield DONE

    def newest(self, out: Path) -> Path | None:
        latest = out / "latest"
        return out / latest.read_text().strip() if latest.exists() else None


class DeepSpeedLate(DeepSpeed):
    """The same, and rank 1 has not even made its file when `latest` is there."""

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / self.unit(step)
        made.mkdir()
        yield OPEN
        yield from torch_save(made / "mp_rank_00_model_states.pt", step)
        yield from torch_save(made / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", step)
        (out / "latest").write_text(self.unit(step))
        yield RACING
        yield from torch_save(made / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", step + 1, RACING)
        yield DONE


class Megatron(Replay):
    """The torch_dist format: shards of two ranks, `.metadata` renamed into place, the rest, and after a barrier the tracker."""

    source = "Megatron-LM at commit 0032978, megatron/training/checkpointing.py: save_checkpoint, iter_finalize_fn; and torch 2.13.0, \
torch/distributed/checkpoint/filesystem.py: FileSystemWriter.write_data, finish"

    def unit(self, step: int) -> str:
        return f"iter_{step:07d}"

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / self.unit(step)
        made.mkdir()
        yield OPEN
        shards = [in_parts(made / f"__{rank}_{part}.distcp", bytes([rank]) * 60_000) for rank in range(2) for part in range(2)]
        while shards:  # all ranks at once
            shard = shards.pop(0)
            for said in shard:
                shards.append(shard)
                yield said
                break
        yield from torch_save(made / "common.pt", step)
        (made / ".metadata.tmp").write_bytes(PICKLE * 100)
        yield OPEN
        os.rename(made / ".metadata.tmp", made / ".metadata")
        yield OPEN
        (made / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
        yield OPEN
        (out / "latest_checkpointed_iteration.txt").write_text(str(step))
        yield DONE

    def newest(self, out: Path) -> Path | None:
        tracker = out / "latest_checkpointed_iteration.txt"
        return out / self.unit(int(tracker.read_text())) if tracker.exists() else None


class MegatronLegacy(Megatron):
    """The torch format: a folder for each rank of the model."""

    source = "Megatron-LM at commit 0032978, megatron/training/checkpointing.py: save_checkpoint with CheckpointType.LEGACY"

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / self.unit(step)
        for rank in range(2):
            (made / f"mp_rank_{rank:02d}").mkdir(parents=True)
            yield OPEN
            yield from torch_save(made / f"mp_rank_{rank:02d}" / "distrib_optim.pt", step)
            yield from torch_save(made / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", step)
        (out / "latest_checkpointed_iteration.txt").write_text(str(step))
        yield DONE


class Orbax(Replay):
    """A folder of another name, renamed when it is whole; it is renamed again before it is removed."""

    source = "orbax-checkpoint 0.12.8, _src/path/atomicity.py: AtomicRenameTemporaryPath.create, finalize; _src/path/deleter.py"

    def unit(self, step: int) -> str:
        return str(step)

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / f"{step}.orbax-checkpoint-tmp"
        made.mkdir()
        yield OPEN
        started = {"item_handlers": {"default": "PyTree"}, "init_timestamp_nsecs": step, "commit_timestamp_nsecs": None}
        (made / "_CHECKPOINT_METADATA").write_text(json.dumps(started))
        yield OPEN
        (made / "default" / "d").mkdir(parents=True)
        (made / "default" / "ocdbt.process_0" / "d").mkdir(parents=True)
        yield OPEN
        yield from in_parts(made / "default" / "ocdbt.process_0" / "d" / f"{step:032x}", b"weights" * 9000)
        (made / "default" / "_METADATA").write_text(json.dumps({"tree_metadata": {}}))
        yield OPEN
        (made / "default" / "_sharding").write_text("{}")
        (made / "default" / "manifest.ocdbt").write_bytes(b"\x0c\xdb\x20\xde" + bytes(100))
        yield OPEN
        shutil.rmtree(made / "default" / "ocdbt.process_0")  # merged into the other
        yield from in_parts(made / "default" / "d" / f"{step + 1:032x}", b"weights" * 9000)
        (made / "_CHECKPOINT_METADATA").write_text(json.dumps({**started, "commit_timestamp_nsecs": step + 1}))
        yield OPEN
        (made / "commit_success.txt").write_text(f"Checkpoint commit was successful to {out / self.unit(step)}")
        yield OPEN
        os.rename(made, out / self.unit(step))
        yield DONE

    def newest(self, out: Path) -> Path | None:
        steps = [int(path.name) for path in out.iterdir() if path.name.isdecimal()]
        return out / str(max(steps)) if steps else None


class LlamaFactory(Replay):
    """Its own trainer ("v1"), two ranks: an empty file marks the end, and then the oldest go."""

    source = "llamafactory 0.9.5, v1/core/utils/checkpoint.py: TrainingCheckpointCoordinator.save, mark_checkpoint_complete"

    def unit(self, step: int) -> str:
        return f"checkpoint-{step}"

    def save(self, out: Path, step: int) -> Iterator[str]:
        made = out / self.unit(step)
        made.mkdir()
        yield OPEN
        (made / "metadata.json").write_text(json.dumps({"global_step": step, "epoch": 1, "num_training_steps": 30}, indent=2))
        yield OPEN
        (made / "model").mkdir()
        yield from safetensors_save(made / "model" / "model-00001-of-00002.safetensors", step)
        yield from safetensors_save(made / "model" / "model-00002-of-00002.safetensors", step)
        names = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
        (made / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        (made / "model" / "tokenizer.json").write_text("{}")
        yield OPEN
        (made / "optimizer").mkdir()
        yield from torch_save(made / "optimizer" / "state_dict.pt", step)
        yield from torch_save(made / "scheduler.pt", step)
        for folder in ("dataloader", "rng_state"):
            (made / folder).mkdir()
            for rank in (1, 0):
                yield from torch_save(made / folder / f"rank_{rank}.pt", step)
        (made / "CHECKPOINT_COMPLETE").touch()
        yield DONE

    def newest(self, out: Path) -> Path | None:
        whole = [path.parent for path in out.glob("checkpoint-*/CHECKPOINT_COMPLETE")]
        return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


REPLAYS = (DeepSpeed, DeepSpeedLate, Megatron, MegatronLegacy, Orbax, LlamaFactory)


def torch_save(path: Path, seed: int, said: str = OPEN) -> Iterator[str]:
    """`torch.save`: a zip archive, its directory last."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/data/0", bytes([seed % 256]) * 50_000)
    yield from in_parts(path, data.getvalue(), said)


def safetensors_save(path: Path, seed: int) -> Iterator[str]:
    """`safetensors` 0.8: full size first, under another name beside it."""
    weights = bytes([seed % 256]) * 50_000
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    made = path.with_name(f".tmp{seed:06d}")
    with open(made, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 8 + len(header) + len(weights))
        yield OPEN
        file.write(len(header).to_bytes(8, "little") + header + weights)
    yield OPEN
    os.rename(made, path)
    yield OPEN


def in_parts(path: Path, data: bytes, said: str = OPEN) -> Iterator[str]:
    """A file that grows, and is closed when the writer goes on after its last part."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), 40_000):
            file.write(data[start : start + 40_000])
            yield said
