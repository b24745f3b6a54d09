"""The house: who may import whom, which module may make which call, how long a module may be.

The rows of the daemon are written down here and nowhere else in code; `daemon/DESIGN.md` draws the same picture.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import ROOT

DAEMON = ROOT / "daemon" / "modelcached"
SDK = ROOT / "sdk" / "modelcache"
PLUGIN = ROOT / "sdk" / "metaflow_extensions"
MAX_LINES = 400

# From the top. A module imports only from lower rows: never its own, never up.
ROWS = """
__main__
command
build
server metrics
connection
verbs outbox arguments admission
service
keeping tending keep importing
fetch save hashing upload load collect upkeep watch evict scrub
sharing repair
gather convert
flights lookup
exchange depot selection
places stores records claims
root features references legacy gc_claim room tenants leftovers
blobs trees repos spool leases pins
transfer store capture
answers
hub
hubapi
download
partials tars first_start holds usage
singleflight tasks lanes spans packs durable acl filesystems frames install listen notify logs recent hubtoken meter latencies rates policy
layout
config
kinds
model
errors
"""
ROW = {name: number for number, row in enumerate(reversed(ROWS.split("\n"))) for name in row.split()}

# Which modules may import which package that is not Python's own.
DAEMON_CLIENTS = {
    "aiobotocore": {"store"},
    "botocore": {"store"},
    "aiohttp": {"answers", "transfer", "store", "metrics"},  # `transfer` names its types only
    "yarl": {"answers"},  # aiohttp's URLs
    "huggingface_hub": {"hub", "hubapi"},  # `hub` names its types only
    "aiofiles": {"*"},
    "msgspec": {"*"},
    "prometheus_client": {"metrics"},
    "modelcache.watch_host": {"watch"},  # the watcher is the SDK's own wherever it runs, and in the daemon it is one of its clients
    "modelcache.client": {"watch"},
    "modelcache.protocol": {"*"},  # what both sides share; nothing else of the SDK
    "modelcache.codes": {"verbs"},
    "modelcache.takeover": {"importing"},
}
SDK_CLIENTS = {
    "rich": {"cli_show", "cli_top"},  # both have plain lines for a machine without it
    "huggingface_hub": {"tokens"},  # asked only for tokens that have to be exchanged first
    "tqdm": {"progress"},
    "watchfiles": {"watch_events"},  # without it folders are looked at every few seconds
}
# The SDK runs on 3.9 to 3.14: what only some of them have is not its standard library.
NOT_ON_EVERY_PYTHON = set(
    """
    annotationlib compression string.templatelib tomllib
    aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils formatter imghdr imp lib2to3 macpath mailcap msilib nis nntplib
    ossaudiodev parser pipes smtpd sndhdr spwd sunau symbol telnetlib uu xdrlib
    """.split()
)

# Which modules may make which calls. `os.` and the names that are as clear without it.
DURABLE_CALLS = {"os.fsync", "os.fdatasync", "os.link", "os.rename", "os.renames", "os.replace", ".hardlink_to", ".rename"}
DESCRIPTOR_CALLS = {".recvmsg", ".sendmsg", ".recvmsg_into", "socket.SCM_RIGHTS", "socket.send_fds", "socket.recv_fds"}


class Module(NamedTuple):
    path: Path
    name: str  # "blobs"; "store.s3" for a module of a subpackage
    text: str

    @property
    def part(self) -> str:
        """What a row names: a module, or a subpackage as a whole."""
        return self.name.partition(".")[0]

    @property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text, str(self.path))))

    def imports(self, package: str) -> Iterator[str]:
        """Full names of everything imported anywhere in it: lazily, for type checking, by `import_module`."""
        here = [package, *self.name.split(".")]
        if self.path.name != "__init__.py":
            here.pop()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                base = [*base, *(node.module.split(".") if node.module else [])]
                yield from (".".join([*base, alias.name]) for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                name = node.args[0] if node.args else None
                if self.name == "__init__":
                    continue  # the package's table of names that are imported when asked for; mypy reads the same ones
                assert isinstance(name, ast.Constant) and isinstance(name.value, str), f"{self.path.name}:{node.lineno}: a computed name"
                yield name.value

    def touches(self) -> set[str]:
        found = set()
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                found |= {f"{owner}.{node.attr}"} | ({f".{node.attr}"} if owner != "durable" else set())
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found


def modules(folder: Path) -> list[Module]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found.append(Module(path, ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path.read_text()))
    return found


DAEMON_MODULES, SDK_MODULES, PLUGIN_MODULES = modules(DAEMON), modules(SDK), modules(PLUGIN)
EVERY_DAEMON_MODULE = pytest.mark.parametrize("module", DAEMON_MODULES, ids=lambda module: module.name)
EVERY_SDK_MODULE = pytest.mark.parametrize("module", SDK_MODULES, ids=lambda module: module.name)


def inner(name: str, package: str) -> str | None:
    """The module or subpackage of `package` that an import names; "__init__" for the package itself."""
    first, _, rest = name.partition(".")
    if first != package:
        return None
    part = rest.partition(".")[0]
    folder = DAEMON if package == "modelcached" else SDK
    return part if (folder / f"{part}.py").exists() or (folder / part).is_dir() else "__init__"


def is_allowed(name: str, module: Module, clients: dict[str, set[str]]) -> bool:
    return any(
        (name == client or name.startswith(client + ".")) and (module.part in users or "*" in users) for client, users in clients.items()
    )


@EVERY_DAEMON_MODULE
def test_types_are_looked_at_before_threads_are(module: Module) -> None:
    """msgspec looks at a type when it first meets it, and two threads that do so together crash: decoders are made at import."""
    calls = [node for node in module.nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "msgspec.json.decode"]
    assert [ast.unparse(call) for call in calls if any(keyword.arg == "type" for keyword in call.keywords)] == []


@EVERY_DAEMON_MODULE
def test_daemon_imports_only_from_lower_rows(module: Module) -> None:
    if module.name == "__init__":
        assert not [name for name in module.imports("modelcached") if inner(name, "modelcached")], "the package itself is below every row"
        return
    assert module.part in ROW, f"{module.path.name} is in no row: say in tests/test_layers.py where it belongs"
    for name in module.imports("modelcached"):
        target = inner(name, "modelcached")
        if target in (None, "__init__") or (target == module.part and module.path.parent != DAEMON):
            continue
        assert ROW[target] < ROW[module.part], f"{module.name} imports {target}, which is not in a lower row"


@EVERY_DAEMON_MODULE
def test_daemon_imports_clients_only_where_they_belong(module: Module) -> None:
    for name in module.imports("modelcached"):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"modelcached"}:
            assert is_allowed(name, module, DAEMON_CLIENTS), f"{module.name} may not import {name}"


@EVERY_DAEMON_MODULE
def test_only_durable_syncs_links_and_renames(module: Module) -> None:
    assert module.name == "durable" or module.touches() & DURABLE_CALLS == set()


@EVERY_DAEMON_MODULE
def test_only_the_connections_touch_ancillary_data(module: Module) -> None:
    assert module.part in ("connection", "outbox") or module.touches() & DESCRIPTOR_CALLS == set()


@EVERY_SDK_MODULE
def test_sdk_is_standard_library_only(module: Module) -> None:
    for name in module.imports("modelcache"):
        first = name.partition(".")[0]
        assert not {name, first} & NOT_ON_EVERY_PYTHON, f"{module.name}: {name} is not on every Python from 3.9 on"
        if first not in sys.stdlib_module_names | {"modelcache"}:
            assert is_allowed(name, module, SDK_CLIENTS), f"{module.name} may not import {name}"


@EVERY_SDK_MODULE
def test_only_the_client_touches_ancillary_data(module: Module) -> None:
    assert module.part == "connection" or module.touches() & DESCRIPTOR_CALLS == set()


def test_metaflow_extension_imports_only_the_sdk() -> None:
    allowed = sys.stdlib_module_names | {"metaflow", "metaflow_extensions", "modelcache"}
    for module in PLUGIN_MODULES:
        assert {name.partition(".")[0] for name in module.imports("metaflow_extensions")} <= allowed, module.name


@pytest.mark.parametrize(("package", "found"), [("modelcached", DAEMON_MODULES), ("modelcache", SDK_MODULES)])
def test_no_cycles(package: str, found: list[Module]) -> None:
    """Lazy imports count: a cycle that works today because of when it is imported is still a cycle."""
    graph = {
        module.part: {target for name in module.imports(package) if (target := inner(name, package)) not in (None, "__init__", module.part)}
        for module in found
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", DAEMON_MODULES + SDK_MODULES + PLUGIN_MODULES, ids=lambda module: str(module.path.relative_to(ROOT)))
def test_module_is_short_and_says_what_it_is_for(module: Module) -> None:
    lines = module.text.count("\n")
    assert lines <= MAX_LINES, f"{lines} lines: two nouns in one file?"
    assert ast.get_docstring(ast.parse(module.text)) or not module.text.strip()
