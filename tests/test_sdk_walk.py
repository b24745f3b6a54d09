"""What `save` finds below a path, what it refuses by name, and that nothing leads it out of there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modelcache.errors import NotPermittedError, NotSaveableError
from modelcache.walk import MAX_PATH_BYTES, Listing, Source

from .conftest import as_uid
from .test_sdk_connection import open_descriptors, sdk_path


def listing(path: Path, follow_links: bool = False) -> Listing:
    with Source(str(path), follow_links) as source:
        return source.listing()


def fill(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())


def test_everything_is_listed_in_order(tmp_path: Path) -> None:
    fill(tmp_path, "b/2", "b/1", "a.bin", "ünï/ço∂é", "with space", "new\nline", "back\\slash")
    (tmp_path / "a.bin").chmod(0o755)
    (tmp_path / "zero").touch()
    (tmp_path / "empty/inner").mkdir(parents=True)
    (tmp_path / "b/link").symlink_to("../a.bin")
    (tmp_path / "dangling").symlink_to("not/there")
    (tmp_path / "to folder").symlink_to("b")
    found = listing(tmp_path)
    assert [(file.path, file.size, file.executable) for file in found.files] == [
        ("a.bin", 5, True),
        ("back\\slash", 10, False),
        ("new\nline", 8, False),
        ("with space", 10, False),
        ("zero", 0, False),
        ("b/1", 3, False),
        ("b/2", 3, False),
        ("ünï/ço∂é", len("ünï/ço∂é".encode()), False),
    ]
    assert found.links == [("dangling", "not/there"), ("to folder", "b"), ("b/link", "../a.bin")]
    assert found.folders == ["empty/inner"]


def test_two_descriptors_however_deep(tmp_path: Path) -> None:
    depth, folder = 500, os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    before = open_descriptors()
    with Source(str(tmp_path)) as source:
        (file,) = source.listing().files
        assert file.path == "d/" * depth + "file"
        os.close(source.open(file.path))
        assert len(open_descriptors()) == len(before) + 2
    assert open_descriptors() == before


@pytest.mark.parametrize("spelling", ["model.bin", "./model.bin", "link.bin"])
def test_one_file_is_saved_under_the_name_it_was_given(tmp_path: Path, spelling: str) -> None:
    fill(tmp_path, "model.bin")
    (tmp_path / "link.bin").symlink_to("model.bin")
    with Source(f"{tmp_path}/{spelling}") as source:
        found = source.listing()
        assert [(file.path, file.size) for file in found.files] == [(os.path.basename(spelling), 9)]
        descriptor = source.open(found.files[0].path)
        assert os.read(descriptor, 100) == b"model.bin"
        os.close(descriptor)
        assert source.difference(found) == ("", "")


def make_socket(path: str) -> None:
    folder, name = os.path.split(path)
    here = os.getcwd()
    os.chdir(folder)  # a socket's name has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    finally:
        os.chdir(here)


REFUSED: list[tuple[str, Callable[[str], None], str]] = [
    ("fifo", os.mkfifo, "is a FIFO"),
    ("socket", make_socket, "is a socket"),
    ("absolute", lambda path: os.symlink("/etc/hostname", path), "is a link that leads out of it, to '/etc/hostname'"),
    ("absolute inside", lambda path: os.symlink(path + ".target", path), "is a link that leads out of it"),
    ("out", lambda path: os.symlink("../../x", path), "is a link that leads out of it, to '../../x'"),
    ("out by another link", lambda path: os.symlink("here/here/../..", path), "is a link that leads out of it"),
    ("target", lambda path: os.symlink(b"\xff", os.fsencode(path)), "is a link to a name that is not UTF-8"),
    ("\udcff\udcfe", lambda path: Path(path).touch(), "has a name that is not UTF-8"),
]


@pytest.mark.parametrize(("name", "make", "message"), REFUSED, ids=[name.encode(errors="replace").decode() for name, _, _ in REFUSED])
def test_what_can_not_be_saved_is_named(tmp_path: Path, name: str, make: Callable[[str], None], message: str) -> None:
    fill(tmp_path, "sub/good")
    (tmp_path / "sub/here").symlink_to(".")
    make(f"{tmp_path}/sub/{name}")
    with pytest.raises(NotSaveableError) as caught:
        listing(tmp_path)
    shown = os.fsencode(name).decode(errors="backslashreplace")
    assert f"'sub/{shown}' {message}" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert ("follow_links=True" in caught.value.hint) == ("leads out" in message)
    assert caught.value.data == {"paths": [f"sub/{shown}"]}
    str(caught.value).encode()  # can be shown anywhere


def test_a_device_is_refused() -> None:
    with pytest.raises(NotSaveableError, match="'null' is a device"):
        listing(Path("/dev/null"))


def test_several_are_named_in_one_error(tmp_path: Path) -> None:
    for number in range(8):
        os.mkfifo(tmp_path / str(number))
    with pytest.raises(NotSaveableError, match=r"'0' is a FIFO; '1' is a FIFO; .* and 3 more"):
        listing(tmp_path)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    name = "ü" * 100  # 200 bytes
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(MAX_PATH_BYTES // 201 + 1):
        os.mkdir(name, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    with pytest.raises(NotSaveableError, match="has a path of more than 3072 bytes"):
        listing(tmp_path)


def test_links_that_lead_out_are_followed_when_asked(tmp_path: Path) -> None:
    """huggingface_hub's cache is made of them."""
    fill(tmp_path, "blobs/abc", "other/deep/file", "snapshot/plain")
    snapshot = tmp_path / "snapshot"
    (snapshot / "model.bin").symlink_to("../blobs/abc")
    (snapshot / "folder").symlink_to(tmp_path / "other")
    (snapshot / "inside").symlink_to("plain")
    (tmp_path / "other/deep/up").symlink_to("../deep/file")
    with Source(str(snapshot), follow_links=True) as source:
        found = source.listing()
        assert [(file.path, file.size) for file in found.files] == [("model.bin", 9), ("plain", 14), ("folder/deep/file", 15)]
        assert found.links == [("inside", "plain"), ("folder/deep/up", "../deep/file")]
        for path, content in (("model.bin", b"blobs/abc"), ("folder/deep/file", b"other/deep/file")):
            descriptor = source.open(path)
            assert os.read(descriptor, 100) == content
            os.close(descriptor)


@pytest.mark.parametrize(
    ("target", "message"),
    [("..", "'up/sub' contains itself"), ("../..", "contains itself"), ("/nowhere/at all", "is a link to '/nowhere/at all': No such file")],
)
def test_following_ends(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "outer/sub").mkdir(parents=True)
    (tmp_path / "outer/sub/up").symlink_to(target)
    with pytest.raises(NotSaveableError, match=message):
        listing(tmp_path / "outer/sub", follow_links=True)


def test_what_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, "in/sub/file", "in/file", "secret/file")
    with Source(str(tmp_path / "in")) as source:
        source.listing()
        (tmp_path / "in/file").unlink()
        (tmp_path / "in/file").symlink_to(tmp_path / "secret/file")
        (tmp_path / "in/sub").rename(tmp_path / "in/old")
        (tmp_path / "in/sub").symlink_to(tmp_path / "secret")
        for path in ("file", "sub/file"):
            with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
                source.open(path)
        (tmp_path / "in/file").unlink()
        os.mkfifo(tmp_path / "in/file")
        os.close(source.open("file"))  # does not hang


def test_a_path_that_is_renamed_stays_the_same(tmp_path: Path) -> None:
    fill(tmp_path, "tmp-1/sub/file")
    with Source(str(tmp_path / "tmp-1")) as source:
        found = source.listing()
        (tmp_path / "tmp-1").rename(tmp_path / "1")
        os.close(source.open("sub/file"))
        assert source.difference(found) in (("", ""), ("", "sub"))


def come_and_go(folder: Path) -> None:
    folder.mkdir()
    folder.rmdir()


CHANGES: list[tuple[str, Callable[[Path], object], tuple[str, str]]] = [
    ("nothing", lambda folder: None, ("", "")),
    ("came and went", lambda folder: come_and_go(folder / "new"), ("", "")),
    ("written to", lambda folder: (folder / "sub/file").write_bytes(b"other"), ("", "")),  # the look at the file tells
    ("came", lambda folder: (folder / "sub/new").touch(), ("", "sub/new")),
    ("folder came", lambda folder: (folder / "sub/new").mkdir(), ("", "sub/new")),
    ("went", lambda folder: (folder / "sub/file").unlink(), ("sub/file", "sub")),
    ("link went", lambda folder: (folder / "link").unlink(), ("link", "")),
    ("replaced", lambda folder: (folder / "other").rename(folder / "sub/file"), ("other", "sub/file")),
    ("folder filled", lambda folder: (folder / "empty/x").touch(), ("", "empty/x")),
]


@pytest.mark.parametrize(("change", "expected"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES])
def test_differences(tmp_path: Path, change: Callable[[Path], object], expected: tuple[str, str]) -> None:
    fill(tmp_path, "sub/file", "other")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "empty").mkdir()
    with Source(str(tmp_path)) as source:
        found = source.listing()
        change(tmp_path)
        assert source.difference(found) == expected


def test_a_folder_that_was_removed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with Source(str(tmp_path / "gone")) as source:
        (tmp_path / "gone").rmdir()
        with pytest.raises(FileNotFoundError):
            source.listing()


@pytest.mark.parametrize("unreadable", ["file", "folder"])
def test_what_the_caller_may_not_read_is_named_before_anything_is_sent(shared_tmp_path: Path, unreadable: str) -> None:
    fill(shared_tmp_path, "good", "sub/file")
    (shared_tmp_path / ("sub" if unreadable == "folder" else "sub/file")).chmod(0o600 if unreadable == "file" else 0o700)
    code = f"""
from modelcache.walk import Source
from modelcache.errors import NotPermittedError
try:
    Source({str(shared_tmp_path)!r}).listing()
except NotPermittedError as error:
    print(error.data["paths"], isinstance(error, PermissionError), "may not read" in str(error))
"""
    ran = subprocess.run([*as_uid(12345), sys.executable, "-c", code], capture_output=True, text=True, env=sdk_path())
    assert ran.stdout == f"[{'sub' if unreadable == 'folder' else 'sub/file'!r}] True True\n", ran.stderr


def test_errors_are_of_the_kinds_users_catch() -> None:
    assert issubclass(NotPermittedError, PermissionError) and issubclass(NotSaveableError, ValueError)
    with pytest.raises(FileNotFoundError):
        Source("/nowhere/at/all")
