"""The table of layouts: every rule finds the checkpoints of its trainer, and no other; each thing that can be missing is missed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelcache import candidates, gates, layouts, scanning
from modelcache.candidates import Unit

from .checkpoints import WHOLE, archive, hf_trainer, make_old, plain, safetensors, write


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def found(folder: Path, layout: str = "auto") -> list[Unit]:
    with opened(folder) as descriptor:
        return candidates.find(scanning.scan(descriptor), layouts.rules(layout))


def problem(folder: Path, layout: str = "auto") -> str:
    """What speaks against the only unit."""
    (unit,) = found(folder, layout)
    with opened(folder) as descriptor:
        return unit.problem or gates.examine(descriptor, unit).problem


@pytest.mark.parametrize("layout", WHOLE)
def test_each_layout_is_recognised(tmp_path: Path, layout: str) -> None:
    path, step, files = WHOLE[layout]
    write(tmp_path, files)
    (unit,) = found(tmp_path)
    assert (unit.rule.name, unit.path, unit.step) == (layout, path, step)
    assert problem(tmp_path) == ""
    assert {each.name for each in layouts.RULES} == set(WHOLE)


@pytest.mark.parametrize("layout", WHOLE)
def test_a_layout_can_be_named(tmp_path: Path, layout: str) -> None:
    path, _, files = WHOLE[layout]
    write(tmp_path, files)
    assert [unit.path for unit in found(tmp_path, layout)] == [path]


@pytest.mark.parametrize("layout", WHOLE)
@pytest.mark.parametrize("name", [".tmpA1b2C3", "w.safetensors.tmp", "part.incomplete", "x.orbax-checkpoint-tmp-1"])
def test_what_is_on_its_way_is_not_complete(tmp_path: Path, layout: str, name: str) -> None:
    path, _, files = WHOLE[layout]
    write(tmp_path, files)
    if (tmp_path / path).is_dir():
        write(tmp_path / path, {name: b"x"})
        assert "on its way" in problem(tmp_path)
    os.rename(tmp_path / path, tmp_path / path.replace(os.path.basename(path), name))
    assert [unit.path for unit in found(tmp_path) if name in unit.path] == []


# What a trainer has not written yet, or what contradicts the rest.
MISSING: dict[str, dict[str, bytes | None]] = {
    "hf-trainer": {
        "checkpoint-100/trainer_state.json": plain({"global_step": 99}),
        "checkpoint-100/model.safetensors": b"\0" * 100,
        "checkpoint-100/checkpoint-is-incomplete.txt": b"",
        "checkpoint-100/rng_state_1.pth": archive(),
        "checkpoint-100/global_step100/x.pt": archive(),
        "checkpoint-100/model.safetensors.index.json": plain({"weight_map": {"w": "model-00001-of-00002.safetensors"}}),
    },
    "accelerate": {"checkpoints/checkpoint_3/random_states_0.pkl": None, "checkpoints/checkpoint_3/random_states_3.pkl": archive()},
    "lightning-sharded": {
        "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt/meta.pt": None,
        "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt/.metadata": None,
    },
    "lightning-deepspeed": {
        "epoch=1-step=20.ckpt/latest": None,
        "epoch=1-step=20.ckpt/checkpoint/mp_rank_00_model_states.pt": None,
    },
    "dcp": {"step-500/.metadata": None, "step-500/.metadata.tmp": b""},
    "deepspeed": {
        "latest": None,
        "global_step40/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": archive(),
        "global_step40/mp_rank_00_model_states.pt": archive()[:-20],
    },
    "megatron": {"latest_checkpointed_iteration.txt": b"100"},
    "megatron-dist": {"latest_checkpointed_iteration.txt": b"", "iter_0000100/metadata.json": None},
    "orbax": {"ckpt/12/_CHECKPOINT_METADATA": plain({"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None})},
    "lerobot": {"checkpoints/000300/training_state/training_step.json": None},
    "dlrover": {"dlrover_latest.txt": b"8", "9/rank_0.pt": None},
    "lightning": {"checkpoints/epoch=0-step=30.ckpt": archive()[:-20]},
    "single-file": {"model-17.safetensors": b"\0" * 1000},
}


@pytest.mark.parametrize(("layout", "path"), [(layout, path) for layout, changes in MISSING.items() for path in changes])
def test_what_is_missing_is_missed(tmp_path: Path, layout: str, path: str) -> None:
    write(tmp_path, WHOLE[layout][2])
    data = MISSING[layout][path]
    if data is None:
        (tmp_path / path).unlink()
    else:
        write(tmp_path, {path: data})
    assert problem(tmp_path)


def test_weights_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"checkpoint-3/trainer_state.json": plain({"global_step": 3}), "checkpoint-3/training_args.bin": archive()})
    assert "none of" in problem(tmp_path)
    diffusers = tmp_path / "diffusers"
    write(diffusers, {"checkpoint-3/random_states_0.pkl": b"x", "checkpoint-3/unet/diffusion_pytorch_model.safetensors": safetensors(b"m")})
    assert problem(diffusers) == ""


def test_a_tracker_may_be_ahead(tmp_path: Path) -> None:
    """A watcher that comes late still takes the older ones."""
    write(tmp_path, {**WHOLE["deepspeed"][2], "latest": b"global_step60"})
    assert problem(tmp_path) == ""
    (unit,) = found(tmp_path)
    assert gates.companions(unit) == {"latest": "global_step40"}


def test_the_outermost_unit_owns_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path, hf_trainer(3) | {"checkpoint-3/latest": b"global_step3"})
    write(tmp_path / "checkpoint-3", {name: data for name, data in WHOLE["deepspeed"][2].items() if name != "latest"})
    (unit,) = found(tmp_path)
    assert (unit.path, unit.rule.name) == ("checkpoint-3", "hf-trainer")


def test_single_files_count_only_where_no_framework_writes(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": b"x", "training_args.bin": b"x", "runs/1": b"x"})
    assert [unit.path for unit in found(tmp_path)] == ["model.safetensors"]
    write(tmp_path, hf_trainer(3))
    assert [unit.path for unit in found(tmp_path)] == ["checkpoint-3"]


ACCELERATED = ("model.safetensors", "optimizer.bin", "scheduler.bin", "sampler.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "README.md")
PRETRAINED = ("model.safetensors", "config.json")


# Folders that are no framework's: what lies in them, and the units.
@pytest.mark.parametrize(
    ("files", "units"),
    [
        # One checkpoint: parts of it lie beside weights.
        ([f"epoch_0/{name}" for name in ACCELERATED], {"epoch_0": 0}),
        ([f"run/step_500/{name}" for name in ACCELERATED], {"run/step_500": 500}),
        ([f"epoch_1/{name}" for name in ADAPTER], {"epoch_1": 1}),
        ([f"epoch_{number}/{name}" for name in PRETRAINED for number in (1, 2)], {"epoch_1": 1, "epoch_2": 2}),
        (["best/model-00001-of-00002.safetensors", "best/model-00002-of-00002.safetensors"], {"best": None}),
        (["ep-3/model.safetensors", "ep-3/state.dat"], {"ep-3": 3}),
        (["ep-3/optimizer.bin", "ep-3/unet/model.safetensors"], {"ep-3": 3}),
        (["model-1.pt", *(f"epoch_1/{name}" for name in ADAPTER)], {"model-1.pt": 1, "epoch_1": 1}),
        # Files that are checkpoints by themselves, in the watched folder or below.
        (["ckpt/model-1.pt", "ckpt/model-2.pt", "ckpt/train.log", "ckpt/config.json"], {"ckpt/model-1.pt": 1, "ckpt/model-2.pt": 2}),
        (["ckpt/model.pt", "ckpt/config.json", "ckpt/args.yaml"], {"ckpt/model.pt": None}),
        (["run/G_100.pth", "run/D_100.pth", "run/githash"], {"run/G_100.pth": 100, "run/D_100.pth": 100}),
        (["run/githash", "run/ckpt/model-1.pt"], {"run/ckpt/model-1.pt": 1}),
        (["run/model.pt", "run/githash", "run/events.out.tfevents.1"], {"run/model.pt": None}),
        (["model.safetensors", "config.json", "vocab.txt"], {"model.safetensors": None}),
    ],
)
def test_a_folder_is_one_checkpoint_or_holds_some(tmp_path: Path, files: list[str], units: dict[str, int | None]) -> None:
    write(tmp_path, {name: safetensors(b"m") for name in files})
    seen = found(tmp_path)
    assert {unit.path: unit.step for unit in seen} == units
    assert all(unit.rule.guessed == (unit.kind == "folder") for unit in seen)


def test_a_state_of_accelerate_may_be_called_anything(tmp_path: Path) -> None:
    """Until its last file is there it is no unit of single files either."""
    for step, unit in enumerate(("epoch_0", "run/step_1")):
        write(tmp_path, {f"{unit}/{name}": safetensors(b"m") for name in ACCELERATED})
        write(tmp_path, {f"{unit}/random_states_0.pkl": b"x"})
        assert [(each.path, each.rule.name, each.step) for each in found(tmp_path) if each.path == unit] == [(unit, "accelerate", step)]
    assert len(found(tmp_path)) == 2


def test_files_are_single_where_they_are_said_to_be(tmp_path: Path) -> None:
    write(tmp_path, {f"epoch_0/{name}": safetensors(b"m") for name in ACCELERATED})
    assert [unit.path for unit in found(tmp_path, "single-file")] == ["epoch_0/model.safetensors", "epoch_0/sampler.bin"]


def test_folders_have_no_age(tmp_path: Path) -> None:
    """Deleting changes them: of two units the one that is half deleted would be the newest."""
    write(tmp_path, hf_trainer(400) | hf_trainer(500))
    make_old(tmp_path)
    os.utime(tmp_path / "checkpoint-500/trainer_state.json", (2, 2))
    for name in ("optimizer.pt", "rng_state.pth"):
        (tmp_path / "checkpoint-400" / name).unlink()
    assert [(unit.path, unit.written_ns) for unit in found(tmp_path)] == [("checkpoint-400", 10**9), ("checkpoint-500", 2 * 10**9)]


def test_what_is_left_of_a_unit(tmp_path: Path) -> None:
    write(tmp_path, hf_trainer(1) | {"checkpoint-1/deep/w": b"x"})
    (before,) = found(tmp_path)
    os.utime(tmp_path / "checkpoint-1")
    assert not found(tmp_path)[0].is_rest_of(before.entries)
    shutil.rmtree(tmp_path / "checkpoint-1/deep")
    (less,) = found(tmp_path)
    assert less.is_rest_of(before.entries) and not less.is_rest_of(less.entries)
    write(tmp_path, {"checkpoint-1/optimizer.pt": archive(b"others")})
    assert not found(tmp_path)[0].is_rest_of(before.entries)


def test_links_stand_for_units(tmp_path: Path) -> None:
    path, _, files = WHOLE["lightning"]
    write(tmp_path, files)
    (tmp_path / "checkpoints/last.ckpt").symlink_to("epoch=0-step=30.ckpt")
    (tmp_path / "checkpoints/away.ckpt").symlink_to("/epoch=0-step=30.ckpt")
    (unit,) = found(tmp_path)
    assert (unit.path, unit.aliases, unit.extra) == (path, (("checkpoints/last.ckpt", "epoch=0-step=30.ckpt"),), "")


def test_a_last_link_is_the_newest_ones_before_it_says_so(tmp_path: Path) -> None:
    """Lightning writes the link after the checkpoint: one killed in between left it at the checkpoint before."""
    path, _, files = WHOLE["lightning"]
    write(tmp_path, files)
    (tmp_path / "checkpoints/last.ckpt").symlink_to("epoch=0-step=20.ckpt")
    (tmp_path / "checkpoints/other.ckpt").symlink_to("epoch=0-step=20.ckpt")
    (unit,) = found(tmp_path)
    assert (unit.path, unit.aliases) == (path, (("checkpoints/last.ckpt", "epoch=0-step=20.ckpt"),))


def test_the_copy_of_the_newest_is_known(tmp_path: Path) -> None:
    path, _, files = WHOLE["lightning"]
    (content,) = files.values()
    write(tmp_path, {**files, "checkpoints/last.ckpt": content, "checkpoints/last-v1.ckpt": content, "last.ckpt": content})
    os.utime(tmp_path / "checkpoints/last.ckpt", (1, 1))
    assert {unit.path: unit.extra for unit in found(tmp_path)} == {
        path: "checkpoints/last-v1.ckpt",
        "checkpoints/last-v1.ckpt": "",
        "checkpoints/last.ckpt": "",
        "last.ckpt": "",
    }


def test_what_is_no_copy_of_the_newest(tmp_path: Path) -> None:
    """Weights only beside a whole state, names that only begin so, and what another framework's rule took."""
    path, weights, state = WHOLE["lightning"][0], archive(b"w" * 100), archive(b"w" * 300)
    write(tmp_path, {path: weights, "checkpoints/last.ckpt": state, "checkpoints/last_layer.ckpt": weights})
    assert {unit.extra for unit in found(tmp_path)} == {""}
    write(tmp_path, {"checkpoints/last.ckpt": archive(b"w" * 110)})
    assert {unit.path: unit.extra for unit in found(tmp_path)} == {
        path: "checkpoints/last.ckpt",
        "checkpoints/last_layer.ckpt": "checkpoints/last.ckpt",
        "checkpoints/last.ckpt": "",
    }
    assert {unit.extra for unit in found(tmp_path, "single-file")} == {""}


def test_a_last_link_is_not_of_weights_only(tmp_path: Path) -> None:
    path, _, files = WHOLE["lightning"]
    write(tmp_path, {**files, "checkpoints/best.ckpt": archive(b"w" * 300)})
    (tmp_path / "checkpoints/last.ckpt").symlink_to(os.path.basename(path))
    aliases = (("checkpoints/last.ckpt", os.path.basename(path)),)
    assert {unit.path: unit.aliases for unit in found(tmp_path)} == {path: aliases, "checkpoints/best.ckpt": ()}
    assert {unit.path: unit.aliases for unit in found(tmp_path, "single-file")} == {path: aliases, "checkpoints/best.ckpt": ()}


def test_a_last_one_that_is_a_file_is_a_unit(tmp_path: Path) -> None:
    """With `save_last=True` the newest of all, and of the same age as the numbered one the other way round."""
    path, _, files = WHOLE["lightning"]
    write(tmp_path, {**files, "checkpoints/last.ckpt": archive(b"later")})
    make_old(tmp_path)
    assert [(unit.path, unit.step) for unit in found(tmp_path)] == [("checkpoints/last.ckpt", None), (path, 30)]
    os.utime(tmp_path / "checkpoints/last.ckpt", (2, 2))
    assert [unit.path for unit in found(tmp_path)] == [path, "checkpoints/last.ckpt"]


def test_metadata(tmp_path: Path) -> None:
    write(tmp_path, hf_trainer(50))
    with opened(tmp_path) as descriptor:
        (unit,) = found(tmp_path)
        said = gates.metadata(descriptor, unit)
    expected = {"step": 50, "epoch": 0.5, "loss": 0.02, "eval_loss": 0.04}
    assert {name: said[name] for name in expected} == expected
    assert dict(layouts.numbers_in("epoch=1-step=20-val_loss=0.31.ckpt")) == {"epoch": 1, "step": 20, "val_loss": 0.31}


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-12", 12), ("global_step7", 7), ("epoch_3_final", 3), ("ckpt_00042", 42), ("model", None), ("run1/x", None), ("v2.1", None)],
)
def test_steps_of_names(name: str, step: int | None) -> None:
    assert layouts.step_of(layouts.Rule("x", layouts.RULES[-1].pattern), name) == step


def test_rules_of_ones_own(tmp_path: Path) -> None:
    place = tmp_path / "rules.json"
    place.write_text(json.dumps([{"name": "ours", "pattern": r"snap-(\d+)", "needs": ["DONE"], "settle": 0.5}]))
    write(tmp_path / "out", {"snap-4/w": b"x"})
    assert problem(tmp_path / "out", str(place)) == "DONE is missing"
    write(tmp_path / "out", {"snap-4/DONE": b""})
    (unit,) = found(tmp_path / "out", str(place))
    assert (unit.rule.name, unit.step, unit.settle) == ("ours", 4, 0.5)
    assert layouts.from_plain(json.loads(json.dumps(layouts.as_plain(layouts.rules(str(place)))))) == layouts.rules(str(place))


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({}, "a list"),
        ([1], "an object"),
        ([{"name": "x"}], "pattern"),
        ([{"name": "x", "pattern": "("}], "the pattern"),
        ([{"name": "x", "pattern": "y", "colour": 1}], "colour"),
        ([{"name": "x", "pattern": "y", "needs": "z"}], "needs"),
        ([{"name": "x", "pattern": "y", "settle": -1}], "settle"),
        ([{"name": "x", "pattern": "y", "kind": "link"}], "kind"),
    ],
)
def test_what_is_wrong_with_rules_is_named(tmp_path: Path, rules: Any, named: str) -> None:
    place = tmp_path / "rules.json"
    place.write_text(json.dumps(rules))
    with pytest.raises(layouts.LayoutError, match=named):
        layouts.rules(str(place))


def test_no_such_layout() -> None:
    with pytest.raises(layouts.LayoutError, match="hf-trainer"):
        layouts.rules("hf")
    with pytest.raises(layouts.LayoutError, match="can't be used"):
        layouts.rules("/nowhere/rules.json")
