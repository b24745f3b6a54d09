"""The caller's token, hub and offline mode: found where huggingface_hub finds them, case by case in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import tokens
from modelcache.errors import LocalTokenNotFoundError

from .conftest import ROOT

HOME: dict[str, str] = {  # path below the home: content
    ".cache/huggingface/token": "from-home\n",
    "xdg/huggingface/token": "from-xdg",
    "hfhome/token": "  from-hf-home \r\n",
    "elsewhere/my-token": "from-path",
    "elsewhere/empty": "\n",
    ".cache/huggingface_staging/token": "from-staging",
}

CASES: list[dict[str, str]] = [
    {},
    {"HF_TOKEN": "a"},
    {"HF_TOKEN": " a\n"},
    {"HF_TOKEN": ""},
    {"HF_TOKEN": " "},
    {"HUGGING_FACE_HUB_TOKEN": "b"},
    {"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b"},
    {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "b"},
    {"XDG_CACHE_HOME": "{home}/xdg"},
    {"XDG_CACHE_HOME": "{home}/none"},
    {"XDG_CACHE_HOME": ""},
    {"HF_HOME": "{home}/hfhome"},
    {"HF_HOME": "~/hfhome"},
    {"HF_HOME": "$HOME/hfhome"},
    {"HF_HOME": "{home}/hfhome", "XDG_CACHE_HOME": "{home}/xdg"},
    {"HF_TOKEN_PATH": "{home}/elsewhere/my-token"},
    {"HF_TOKEN_PATH": "~/elsewhere/my-token", "HF_HOME": "{home}/hfhome"},
    {"HF_TOKEN_PATH": "$HOME/elsewhere/my-token"},
    {"HF_TOKEN_PATH": "{home}/elsewhere/empty"},
    {"HF_TOKEN_PATH": "{home}/elsewhere/none"},
    {"HF_TOKEN_PATH": "{home}/elsewhere/none", "HF_TOKEN": "a"},
    {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
    {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "yes", "HF_TOKEN": "a"},
    {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HF_TOKEN": "a"},
    {"HUGGINGFACE_CO_STAGING": "1"},
    {"HF_ENDPOINT": "http://127.0.0.1:9/"},
    {"HF_ENDPOINT": "http://127.0.0.1:9", "HUGGINGFACE_CO_STAGING": "true"},
    {"HF_HUB_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "on"},
    {"HF_HUB_OFFLINE": "2"},
    {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "YES"},
    {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
]

THEIRS = """
import json, sys
from huggingface_hub import constants
from huggingface_hub.utils._headers import get_token_to_send
def send(token):
    try:
        return get_token_to_send(token)
    except OSError as error:
        return "OSError"
endpoint = constants.ENDPOINT
print(json.dumps([[send(token) for token in (None, True, False, "own", "")],
                  None if endpoint == "https://huggingface.co" else endpoint, constants.HF_HUB_OFFLINE]))
"""
OURS = """
import json, sys
from modelcache import tokens
def send(token):
    try:
        return tokens.token_to_send(token)
    except OSError as error:
        return "OSError"
print(json.dumps([[send(token) for token in (None, True, False, "own", "")], tokens.endpoint(), tokens.is_offline()]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for path, content in HOME.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(content)
    return home


def ask(code: str, home: Path, environment: dict[str, str]) -> Any:
    kept = {name: os.environ[name] for name in ("PATH", "MODELCACHE_TEST_SESSION") if name in os.environ}
    values = {name: value.format(home=home) for name, value in environment.items()}
    variables = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT / "sdk"), **values}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# One process answers for all cases, each in a fork of its own: huggingface_hub reads the environment when it is imported.
EACH_IN_A_FORK = """
import json, os, sys
import configparser, logging, pathlib, re, tempfile, typing  # what every case would import again
for environment in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.environ.update(environment)
        os.dup2(writing, 1)
        exec(sys.argv[2])
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    print(os.read(reading, 10000).decode().strip() or "null", flush=True)
    os.close(reading)
"""


@pytest.mark.timeout(90)
def test_like_huggingface_hub(home: Path) -> None:
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT / "sdk")}
    cases = [{name: value.format(home=home) for name, value in case.items()} for case in CASES]
    answers = []
    for code in (THEIRS, OURS):
        command = [sys.executable, "-c", EACH_IN_A_FORK, json.dumps(cases), code]
        ran = subprocess.run(command, capture_output=True, text=True, env=kept, check=True)
        answers.append([json.loads(line) for line in ran.stdout.splitlines()])
    theirs, ours = answers
    assert len(theirs) == len(ours) == len(CASES)
    assert [(case, answer) for case, answer in zip(CASES, ours, strict=True)] == [
        (case, answer) for case, answer in zip(CASES, theirs, strict=True)
    ]
    assert len({json.dumps(answer) for answer in theirs}) > 8  # the table tells cases apart


def test_no_token_at_all(tmp_path: Path) -> None:
    assert ask(OURS, tmp_path, {})[0] == [None, "OSError", None, "own", ""]


def test_a_missing_token_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(LocalTokenNotFoundError, match="HF_TOKEN"):
        tokens.token_to_send(True)


@pytest.mark.parametrize(("left", "expired"), [(3600, True), (90000, False)])
def test_a_login_that_expires_soon_is_left_to_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, expired: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "stored_tokens").write_text(f"[me]\nhf_token = t%\nrefresh_token = r\nexpires_at = {int(time.time()) + left}\n")
    assert tokens._expires_soon("t%") is expired
    assert tokens._expires_soon("another") is False


def test_headers_hold_a_token() -> None:
    assert tokens.token_in_headers({"Authorization": "Bearer x"}) == "x"
    assert tokens.token_in_headers({"x-other": "Bearer x"}) is None
    assert tokens.token_in_headers(None) is None
