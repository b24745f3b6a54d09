"""Finds the caller's token, its hub and whether it is offline: everywhere huggingface_hub looks, in its order.

The environment is read at each call, not once at import. The token goes to the daemon with the request and nowhere else.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Mapping, Optional, Union

from .errors import LocalTokenNotFoundError

_REFRESH_SECONDS = 24 * 3600  # huggingface_hub refreshes a token of a browser login when less than this is left
_STAGING_ENDPOINT = "https://hub-ci.huggingface.co"


def token_to_send(token: Union[bool, str, None]) -> Optional[str]:
    """A str is the token; False is none; True must be found (LocalTokenNotFoundError, an OSError); None may be found."""
    if isinstance(token, str):
        return token
    if token is False or (token is None and is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None
    found = find_token()
    if found is None and token is True:
        raise LocalTokenNotFoundError(
            "Token is required (`token=True`), but no token found", "set HF_TOKEN, log in with `hf auth login`, or pass the token itself"
        )
    return found


def token_in_headers(headers: Optional[Mapping[str, str]]) -> Optional[str]:
    """The bearer token among a request's own headers; it wins over every other."""
    for name, value in (headers or {}).items():
        if name.lower() == "authorization":
            return value[len("Bearer ") :] if value.startswith("Bearer ") else value
    return None


def find_token() -> Optional[str]:
    """The token of whoever is logged in here, or None."""
    if os.environ.get("HF_OIDC_RESOURCE"):  # exchanged for a short-lived one, over the network
        return _ask_huggingface_hub("HF_OIDC_RESOURCE is set")
    found = _clean(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    if found is not None:
        return found
    found = _from_file()
    if found is None and "google.colab" in sys.modules and os.environ.get("VERTEX_PRODUCT") != "COLAB_ENTERPRISE":
        return _ask_huggingface_hub("in Google Colab")
    if found is not None and _expires_soon(found):
        return _ask_huggingface_hub("") or found
    return found


def endpoint() -> Optional[str]:
    """The hub that the environment names, without a trailing slash, or None."""
    if is_true("HUGGINGFACE_CO_STAGING"):
        return _STAGING_ENDPOINT
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def is_offline() -> bool:
    return _is_true(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"))


def is_true(variable: str) -> bool:
    """An environment variable, read as huggingface_hub reads its flags."""
    return _is_true(os.environ.get(variable))


def token_path() -> str:
    if is_true("HUGGINGFACE_CO_STAGING"):
        return os.path.join(os.path.expanduser("~"), ".cache", "huggingface_staging", "token")
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = _expanded(os.environ.get("HF_HOME", os.path.join(cache, "huggingface")))
    return _expanded(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token")))


def _from_file() -> Optional[str]:
    try:
        with open(token_path()) as file:  # in the locale's encoding, as huggingface_hub does
            return _clean(file.read())
    except FileNotFoundError:
        return None


def _expires_soon(token: str) -> bool:
    """Whether huggingface_hub would exchange this token for a fresh one first."""
    path = os.path.join(os.path.dirname(token_path()), "stored_tokens")
    if not os.path.exists(path):
        return False
    from configparser import ConfigParser, Error

    stored = ConfigParser(interpolation=None)
    try:
        stored.read(path, encoding="utf-8")
        for name in stored.sections():
            fields = stored[name]
            if fields.get("hf_token") == token and "refresh_token" in fields:
                return int(fields["expires_at"]) - _REFRESH_SECONDS <= time.time()
    except (Error, ValueError, KeyError):
        pass
    return False


def _ask_huggingface_hub(why: str) -> Optional[str]:
    """Some tokens have to be fetched over the network first; only huggingface_hub knows how."""
    try:
        import huggingface_hub
    except ImportError:
        if not why:
            return None
        raise LocalTokenNotFoundError(
            "%s, and only huggingface_hub can get a token from there" % why, "pip install huggingface_hub, or pass `token=`"
        ) from None
    found: Any = huggingface_hub.get_token()
    return None if found is None else str(found)


def _clean(token: Optional[str]) -> Optional[str]:
    return None if token is None else token.replace("\r", "").replace("\n", "").strip() or None


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def _is_true(value: Optional[str]) -> bool:
    return value is not None and value.upper() in ("1", "ON", "YES", "TRUE")
