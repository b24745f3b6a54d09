"""`python -m tests.client_process`: a task that uses the SDK, told what to do on stdin. Its handle is `Client` in clients.py.

A JSON line in for each call, JSON lines out: {"progress": ...} while it runs, then its outcome. Leases are held until the process ends.
Only what the SDK itself imports is imported before the first call: hundreds of these run at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def file_hashes(folder: str) -> dict[str, str]:
    """Path and SHA-256 of every file below (links are none), read through the path that the task was given."""
    import hashlib

    found = {}
    for above, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(above, name)
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Task:
    """Does what it is told; `kept` are the leases of raw fetches."""

    def __init__(self, asked: TextIO, told: TextIO) -> None:
        self._asked = asked
        self._told = told
        self._kept: list[Any] = []

    def run(self) -> None:
        for line in self._asked:
            ask = json.loads(line)
            try:
                outcome = getattr(self, "do_" + ask["call"])(**ask["arguments"])
            except Exception as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                outcome = {"error": kinds, "message": str(error), "value": getattr(error, "data", None)}
            if outcome is not None:
                self._tell(outcome)

    def do_snapshot_download(self, hashes: bool = False, **arguments: Any) -> dict[str, Any]:
        """The public call. `hashes`: also read every file of what it returned."""
        import modelcache

        path = modelcache.snapshot_download(**arguments)
        if arguments.get("dry_run"):
            return {"value": [info._asdict() for info in path]}
        return {"path": path, "files": file_hashes(path) if hashes else None}

    def do_hf_hub_download(self, **arguments: Any) -> dict[str, Any]:
        import modelcache

        path = modelcache.hf_hub_download(**arguments)
        if arguments.get("dry_run"):
            return {"value": path._asdict()}
        return {"path": path}

    def do_import(self, module: str) -> dict[str, Any]:
        """As a program that has imported it before it asks."""
        __import__(module)
        return {}

    def do_fetch(self, **arguments: Any) -> dict[str, Any]:
        """One request as the SDK sends it, with every progress notification passed on and the whole reply."""
        from modelcache import client, protocol

        fetched = client.shared().fetch(protocol.Fetch(**arguments), lambda progress: self._tell({"progress": progress._asdict()}))
        self._kept.append(fetched.lease)
        return {"path": fetched.reply.path, "value": fetched.reply._asdict()}

    def do_ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Any other verb of the daemon."""
        from modelcache import client, protocol

        kinds: dict[str, Any] = {"rm": protocol.Remove, "ls": protocol.List_, "verify": protocol.Verify, "status": protocol.Status}
        kinds |= {"pin": protocol.Pin, "pins": protocol.Pins, "unpin": protocol.Unpin}
        kinds |= {"evict": protocol.Evict, "explain": protocol.Explain}
        return {"value": client.shared().call(method, kinds[method](**arguments))}

    def do_save(self, path: str, **arguments: Any) -> dict[str, Any]:
        import modelcache

        return {"value": modelcache.save(path, **arguments)}

    def do_load(self, reference: Any, path: str | None = None, hashes: bool = False) -> dict[str, Any]:
        import modelcache

        loaded = modelcache.load(reference, path)
        return {"path": loaded, "files": file_hashes(loaded) if hashes else None}

    def do_flush(self, deadline: float | None = None, everything: bool = False) -> dict[str, Any]:
        import modelcache

        modelcache.flush(deadline, everything=everything)
        return {}

    def do_wire(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """One request as it goes over the wire."""
        from modelcache import client

        return {"value": client.shared().session(lambda connection, _: connection.request(method, params)).result}

    def do_hashes(self, folder: str) -> dict[str, Any]:
        return {"files": file_hashes(folder)}

    def do_fork(self, asked: str, told: str) -> dict[str, Any] | None:
        """The child serves a handle of its own over two named pipes."""
        child = os.fork()
        if child:
            return {"value": child}
        self._told = open(told, "w")  # in the order in which the handle opens them
        self._asked = open(asked)
        self.run()
        os._exit(0)

    def _tell(self, message: dict[str, Any]) -> None:
        self._told.write(json.dumps(message) + "\n")
        self._told.flush()


if __name__ == "__main__":
    Task(sys.stdin, sys.stdout).run()
