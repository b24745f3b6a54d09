"""The daemon's own token for its hub, for the hub's rate limits alone: who asks without a token counts as this one, instead of as one
of all the nodes behind the same address.

It never gives a caller what the caller's own token, or none, would not (I8): it is used only for callers without a token, at the
default endpoint only, for repos that were public when last seen; and for what does not itself tell whether they still are, only right
after that. It comes from systemd's credentials (`LoadCredential=hub-token:...`), lives in memory only, and is left out when the
hub does not accept it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from .errors import RootError
from .model import Repo

CREDENTIAL = "hub-token"
PUBLIC_SECONDS = 60.0  # so long "public" is believed where this token is concerned
log = logging.getLogger(__name__)


class HubToken:
    def __init__(self, secret: str, endpoint: str) -> None:
        self._secret: str | None = secret or None
        self._endpoint = endpoint

    @classmethod
    def of(cls, environment: Mapping[str, str], endpoint: str) -> HubToken:
        """What the service manager passed, if it did. RootError for what is no token."""
        folder = environment.get("CREDENTIALS_DIRECTORY", "")
        path = Path(folder) / CREDENTIAL
        try:
            secret = path.read_text("ascii").strip() if folder else ""
        except FileNotFoundError:
            secret = ""
        except (OSError, UnicodeDecodeError) as error:
            raise RootError(f"the credential {CREDENTIAL} can't be read: {type(error).__name__}", f"look at {path}") from None
        if not secret.isprintable() or " " in secret:
            raise RootError(f"the credential {CREDENTIAL} holds no token", f"{path} has to hold one line")
        return cls(secret, endpoint)

    def instead_of(self, token: str | None, repo: Repo, public_since: float | None) -> str | None:
        """The token to send for this caller, whose own is `token`. `public_since`: when the hub last called the repo public (epoch)."""
        is_public = public_since is not None and 0 <= time.time() - public_since < PUBLIC_SECONDS
        return self._secret if token is None and is_public and repo.endpoint == self._endpoint else token

    def refused(self) -> None:
        """The hub does not accept it: callers without a token go without one from here on."""
        if self._secret is not None:
            self._secret = None
            log.error("the hub does not accept the daemon's own token", extra={"credential": CREDENTIAL, "endpoint": self._endpoint})

    def __repr__(self) -> str:
        return f"<HubToken {'for ' + self._endpoint if self._secret else 'none'}>"
