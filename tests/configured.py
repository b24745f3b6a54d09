"""`start_configured`: a daemon that reads a file, too, and what makes it read the file again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

from .daemon import Daemon, HasEndpoint
from .saves import until


class Configured(Daemon):
    file: Path

    def reload(self, text: str) -> str:
        """Puts the text into the file, and tells the daemon; what it says to that."""
        before = len(self.log)
        self.file.write_text(text)
        os.kill(self.pid, signal.SIGHUP)
        until(lambda: "event=reloaded" in self.log[before:] or "not taken over" in self.log[before:])
        return self.log[before:]


def start_configured(file: Path, text: str, root: Path, hub: HasEndpoint | None = None, **config: Any) -> Configured:
    """A daemon whose configuration file is `file`, with that text."""
    file.write_text(text)
    kind: type[Configured] = type("ConfiguredDaemon", (Configured,), {"file": file, "wrapper": ("env", f"MODELCACHED_CONFIG={file}")})
    return cast(Configured, kind.start(root, hub, **config))
