"""What a caller asks for, and which files of a commit that is: huggingface_hub's own patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .errors import EntryNotFound, IncompleteSnapshot
from .model import Commit, ListedFile, Repo


class Ask(NamedTuple):
    """What a caller asks for."""

    repo: Repo
    revision: str
    allow: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    filename: str | None
    token: str | None
    force: bool = False  # ask the hub now, and hash what is here
    local: bool = False  # the hub may not be asked


class Selection(NamedTuple):
    """The same, once it is known what the revision is and that the caller may have it."""

    repo: Repo
    commit: Commit
    allow: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    filename: str | None


def selected(selection: Selection, files: Sequence[ListedFile]) -> list[ListedFile]:
    """The files that were asked for; huggingface_hub's own patterns."""
    if selection.filename is not None:
        chosen = [file for file in files if file.path == selection.filename]
        if not chosen:
            raise EntryNotFound(
                f"{selection.repo}@{selection.commit[:8]} has no file {selection.filename!r}",
                "see its files with: modelcache pull --dry-run",
                repo_id=selection.repo.id,
            )
        return chosen
    if selection.allow is None and selection.ignore is None:
        return list(files)
    from .hubapi import matching

    allow, ignore = (None if patterns is None else list(patterns) for patterns in (selection.allow, selection.ignore))
    wanted = set(matching([file.path for file in files], allow, ignore))
    return [file for file in files if file.path in wanted]


def incomplete(selection: Selection, missing: list[ListedFile]) -> IncompleteSnapshot:
    names = ", ".join(repr(file.path) for file in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return IncompleteSnapshot(
        f"{len(missing)} files of {selection.repo}@{selection.commit[:8]} are not on this node: {names}",
        "drop local_files_only and HF_HUB_OFFLINE to fetch them",
        missing=len(missing),
    )
