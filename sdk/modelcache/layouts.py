"""How trainers lay out their checkpoints: one table of rules, which a user may extend.

The first rule that fits a folder or file owns it and everything in it, the outermost folder first. Rules say what a unit is called,
what has to be in it, and how long it must have been quiet; what holds for all of them (nobody writes to it, files of known formats are
whole, it is the same after the capture) stands in `candidates` and `gates`.

Where no framework writes, files are checkpoints by themselves, and a folder below the watched one is one as a whole if parts of a
checkpoint lie in it beside weights: an optimizer, a tokenizer, a config, a file that no rule takes (`is_part`). Only quiet tells when it
ends, so it is guessed. It is none, and each file in it counts, if weights in it have numbers of their own (model-1.pt, model-2.pt) or
a log lies in it: then a whole run writes there.

Rules of one's own lie in a JSON file, whose path is given instead of a name: a list of objects with the fields of `Rule`; only `name`
and `pattern` have to be there. They come before the table's:

    [{"name": "ours", "pattern": "snap-(\\\\d+)", "needs": ["DONE"], "settle": 2}]
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, NamedTuple, Optional, Pattern, Sequence, Tuple

AUTO = "auto"
QUIET = "quiet"  # the fallback: whatever lies at the top and was quiet for long
FRAMEWORK, SINGLE, FALLBACK = 0, 1, 2  # rules of a higher tier are asked only where no name fits one of a lower tier


class Rule(NamedTuple):
    """Patterns of names are regular expressions for the whole name; their first group that matches is the step. Globs are fnmatch's,
    of paths inside the unit."""

    name: str
    pattern: str  # of the unit's own name
    kind: str = "folder"  # or "file"
    needs: Tuple[str, ...] = ()  # globs; each has to be there
    needs_any: Tuple[str, ...] = ()  # globs; one of them at least
    marks: Tuple[str, ...] = ()  # globs; one at least, or it is no unit of this rule at all
    without: Tuple[str, ...] = ()  # globs; where one is there, it is no unit of this rule
    forbids: Tuple[str, ...] = ()  # globs; where one is there, it is not complete yet
    pairs: Tuple[str, ...] = ()  # "glob:glob": where the first is there, the second has to be
    counted: Tuple[str, ...] = ()  # regular expressions of paths whose first group is a rank: 0, 1, ... without a gap
    step_in: str = ""  # "trainer_state.json:global_step": a number in a JSON file that has to be the step of the name
    ended_in: str = ""  # "_CHECKPOINT_METADATA:commit_timestamp_nsecs": a value in a JSON file that is null until the end
    tracker: str = ""  # a file beside the unit that names the newest one: the unit's step or a later one
    tracker_text: str = ""  # what the tracker says of this unit: "{name}" or "{step}"
    settle: float = 5.0  # seconds without a change
    settle_ranks: float = 0.0  # instead, where files of ranks above 0 are there: other nodes may be late
    tier: int = FRAMEWORK
    guessed: bool = False  # nothing but quiet marks its end

    @property
    def regex(self) -> Pattern[str]:
        return compiled(self.pattern)


_NUMBERED = r"(?:.*?(?:step|iter|epoch|checkpoint|ckpt)[-_=]?(\d+).*|(?:.*[^\d.])?(\d+)|.*)"  # the number that most likely is the step
_STEP_IN_CKPT = r"(?:.*?step=(\d+).*|.*)\.ckpt"
_RANKS = (r"rng_state_(\d+)\.pth", r"random_states_(\d+)\.pkl")
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "model*", "global_step*", "*.distcp", "*.h5", "*.msgpack")
_WEIGHTS_IN_FOLDERS = ("*/*.safetensors", "*/*.bin", "*/*.distcp")  # of diffusers' models

RULES: Tuple[Rule, ...] = (
    # LLaMA-Factory's own trainer marks the end itself.
    Rule("llamafactory", r"checkpoint-(\d+)", marks=("CHECKPOINT_COMPLETE",), settle=2.0),
    # rank 0 writes trainer_state.json before other ranks are known to be done.
    Rule(
        "hf-trainer",
        r"checkpoint-(\d+)",
        marks=("trainer_state.json",),
        needs_any=_WEIGHTS,
        forbids=("checkpoint-is-incomplete.txt",),
        pairs=("global_step*:latest",),
        counted=_RANKS,
        step_in="trainer_state.json:global_step",
        settle_ranks=30.0,
    ),
    # Accelerate's `save_state`, and scripts with it: nothing marks the end; "checkpoint_N" is the number of the save, "-N" the step.
    Rule(
        "accelerate",
        _NUMBERED,
        marks=("random_states_*.pkl",),
        needs=("random_states_0.pkl",),
        needs_any=_WEIGHTS + _WEIGHTS_IN_FOLDERS,
        counted=_RANKS,
        settle=10.0,
    ),
    # Lightning with sharded strategies: a folder with the name of a file.
    Rule("lightning-sharded", _STEP_IN_CKPT, marks=("meta.pt", ".metadata", "*.distcp"), needs=("meta.pt", ".metadata"), settle=2.0),
    # Lightning with DeepSpeed: the same as of `deepspeed`, in a folder of its own.
    Rule(
        "lightning-deepspeed",
        _STEP_IN_CKPT,
        marks=("checkpoint/*_states.pt",),
        needs=("latest", "checkpoint/*_model_states.pt"),
        settle=10.0,
    ),
    Rule(
        "megatron-dist",
        r"iter_(\d+)",
        marks=("*.distcp",),
        needs=("metadata.json", ".metadata"),
        tracker="latest_checkpointed_iteration.txt",
        tracker_text="{step}",
    ),
    Rule(
        "megatron",
        r"iter_(\d+)",
        without=("*.distcp",),
        needs_any=("*.pt", "*/*.pt"),
        tracker="latest_checkpointed_iteration.txt",
        tracker_text="{step}",
    ),
    # torch.distributed.checkpoint, torchtitan: `.metadata` is renamed into place at the end.
    Rule("dcp", _NUMBERED, marks=("*.distcp",), needs=(".metadata",), forbids=(".metadata.tmp",)),
    # rank 0 writes `latest` before other ranks are known to be done.
    Rule(
        "deepspeed",
        r"global_step(\d+)",
        marks=("*_optim_states.pt", "*_model_states.pt"),
        counted=(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt",),
        tracker="latest",
        tracker_text="{name}",
        settle=10.0,
    ),
    # Orbax renames the folder when it is whole; on filesystems where it can't, its metadata says so.
    Rule(
        "orbax",
        r"(?:.*?[-_])?(\d+)",
        marks=("_CHECKPOINT_METADATA",),
        ended_in="_CHECKPOINT_METADATA:commit_timestamp_nsecs",
        settle=2.0,
    ),
    Rule("torchsnapshot", _NUMBERED, marks=(".snapshot_metadata",), settle=2.0),
    Rule("lerobot", r"(\d+)", marks=("pretrained_model/*",), needs=("training_state/*",)),
    Rule(
        "dlrover",
        _NUMBERED,
        marks=("rank_*.pt",),
        counted=(r"rank_(\d+)\.pt",),
        tracker="dlrover_latest.txt",
        tracker_text="{step}",
    ),
    Rule("nvrx", r"iter_(\d+)_\d+_local\.pt", kind="file", settle=2.0),
    Rule("lightning", _STEP_IN_CKPT, kind="file", settle=2.0),
    Rule("keras", _NUMBERED + r"\.(?:keras|weights\.h5)", kind="file", settle=2.0),
    Rule(
        "single-file",
        r"(?!training_args\.|optimizer\.|scheduler\.|rng_state|random_states_)" + _NUMBERED + r"\.(?:safetensors|pt|pth|bin|ckpt|h5)",
        kind="file",
        settle=2.0,
        tier=SINGLE,
    ),
    Rule(QUIET, _NUMBERED, kind="any", settle=30.0, tier=FALLBACK, guessed=True),
)

# A folder with such a name is a framework's checkpoint, also while too little of it is there for any rule: nothing in it is one itself.
_ONE_UNIT = re.compile(r"checkpoint[-_]\d+|global_step\d+|iter_\d+")

# A name like one of these, anywhere in a path: on its way, or on its way out.
TEMPORARY = re.compile(
    r"\.tmp.*|.*\.tmp|tmp[-_].*|.*\.tmp-.*"
    r"|.*\.(?:part|partial|incomplete|temp|dirty|swp|lock)|.*~"
    r"|.*\.orbax-checkpoint-tmp.*|\._dlrover_ckpt_stage"
    r"|\.(?:nfs|fuse_hidden)[0-9a-f].*",
    re.DOTALL,
)

# Never a unit of the fallback: what trainers write beside their checkpoints.
_LOGS = r"runs|logs?|wandb|mlruns|tensorboard|lightning_logs|tb_logs|events\.out\..*|.*\.(?:log|jsonl|csv|tsv|out|err)"
_LOG = re.compile(_LOGS, re.IGNORECASE)
_NO_CHECKPOINT = re.compile(_LOGS + r"|\..*|__pycache__|cache|README.*|.*\.(?:txt|md|json|yaml|yml|toml|py|pyc|png|html)", re.IGNORECASE)

# Of one checkpoint, though nothing else tells it from what trainers write beside them; and the weights that make a config one.
_SHARD = re.compile(r".*-\d+-of-\d+\..*")
_PART = re.compile(r".*_config\.json|model_index\.json|tokenizer.*|special_tokens_map\.json|vocab\..*|merges\.txt|.*\.index\.json")
_PRETRAINED = re.compile(r"(?:pytorch_|adapter_|tf_)?model\.(?:safetensors|bin|h5)")


class LayoutError(ValueError):
    """A layout that can't be used; the message says why."""


def rules(layout: str) -> Tuple[Rule, ...]:
    """The rules that "auto", the name of one, or the path of a file with some stands for. LayoutError names what is wrong."""
    if layout == AUTO:
        return RULES
    named = tuple(rule._replace(tier=FRAMEWORK) for rule in RULES if rule.name == layout)
    if named:
        return named
    if not layout.endswith(".json"):
        known = ", ".join(rule.name for rule in RULES)
        raise LayoutError("no layout is called %r: it is one of auto, %s, or the path of a JSON file with rules" % (layout, known))
    try:
        with open(layout, encoding="utf-8") as file:
            return parse(json.load(file))
    except (OSError, ValueError) as error:
        raise LayoutError("the layout %s can't be used: %s" % (layout, error)) from error


def parse(listed: Any) -> Tuple[Rule, ...]:
    """Rules from JSON, and the table's behind them."""
    if not isinstance(listed, list):
        raise LayoutError("rules are a list of objects")
    return tuple(_rule(each) for each in listed) + RULES


def is_temporary(name: str) -> bool:
    return TEMPORARY.fullmatch(name) is not None


def may_hold_checkpoints(name: str) -> bool:
    return not _ONE_UNIT.fullmatch(name)


def may_be_checkpoint(name: str) -> bool:
    """Whether the fallback may take it for one."""
    return not _NO_CHECKPOINT.fullmatch(name)


def is_log(name: str) -> bool:
    return _LOG.fullmatch(name) is not None


def is_part(name: str, beside: Sequence[str]) -> bool:
    """Whether a file is a part of what lies `beside` it. Its name fits no rule of single files, or says so nevertheless."""
    if name == "config.json":
        return any(_PRETRAINED.fullmatch(each) for each in beside)
    return bool(_SHARD.fullmatch(name) or _PART.fullmatch(name))


def is_version(rule: Rule, name: str) -> bool:
    """Whether a single file's name numbers it among others. A shard's number doesn't."""
    return step_of(rule, name) is not None and not _SHARD.fullmatch(name)


def step_of(rule: Rule, name: str) -> Optional[int]:
    found = rule.regex.fullmatch(name)
    group = next((group for group in found.groups() if group), None) if found else None
    return int(group) if group and len(group) < 19 else None


def compiled(pattern: str) -> Pattern[str]:
    return re.compile(pattern)  # re keeps the latest ones


def tracked_step(text: str) -> Optional[int]:
    """The step that a tracker names; None for what is no tracker's text."""
    found = re.search(r"(\d{1,18})\s*$", text.strip())
    return int(found.group(1)) if found else None


def numbers_in(name: str) -> List[Tuple[str, float]]:
    """What a name says of itself: "epoch=1-step=20-val_loss=0.31.ckpt"."""
    found = re.findall(r"([A-Za-z_][A-Za-z0-9_/]*)=(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", name)
    return [(word, float(value) if set(value) & set(".eE") else int(value)) for word, value in found]


def _rule(values: Any) -> Rule:
    if not isinstance(values, dict):
        raise LayoutError("a rule is an object, not %r" % (values,))
    unknown = sorted(set(values) - set(Rule._fields))
    missing = sorted({"name", "pattern"} - set(values))
    if unknown or missing:
        raise LayoutError("a rule has no field %s" % unknown[0] if unknown else "a rule lacks its %s" % missing[0])
    defaults = Rule("", "")
    for field, value in values.items():
        expected = getattr(defaults, field)
        if isinstance(expected, tuple):
            sound = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
        elif isinstance(expected, bool) or not isinstance(expected, (int, float)):
            sound = isinstance(value, type(expected))
        else:
            sound = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        if not sound:
            raise LayoutError("%s of a rule can't be %r" % (field, value))
    fields: Dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
    made = Rule(**fields)
    if made.kind not in ("folder", "file", "any"):
        raise LayoutError("the kind of a rule is 'folder', 'file' or 'any', not %r" % made.kind)
    for pattern in (made.pattern, *made.counted):
        try:
            re.compile(pattern)
        except re.error as error:
            raise LayoutError("the pattern %r: %s" % (pattern, error)) from error
    return made


def as_plain(some: Sequence[Rule]) -> List[Any]:
    """Rules as JSON can carry them."""
    return [rule._asdict() for rule in some]


def from_plain(listed: List[Any]) -> Tuple[Rule, ...]:
    """What `as_plain` made."""
    return tuple(_rule(each) for each in listed)
