"""The wire between the SDK and the daemon: newline-delimited JSON-RPC 2.0 with descriptors.

One JSON object a line, UTF-8, on a Unix stream socket. Besides JSON-RPC's own members a message may carry
`"fds": N` (0 to 64): so many descriptors ride as `SCM_RIGHTS` on the first byte of its line, queue in order
of arrival, and are taken by the message that declares them.

Request       {"jsonrpc": "2.0", "id": 1, "method": "fetch", "params": {...}}       params: the fields of a NamedTuple below
Reply         {"jsonrpc": "2.0", "id": 1, "result": {...}, "fds": 1}
Error         {"jsonrpc": "2.0", "id": 1, "error": {"code": ..., "message": ..., "data": {"name": ..., "hint": ..., ...}}}
Notification  daemon to client {"method": "progress", "params": {"id": 1, ...Progress}}
              client to daemon {"method": "cancel", "params": {"id": 1}}: the caller has left

A result too large for one line is `{"jsonrpc": "2.0", "id": 1, "result": {"in_fd": true}, "fds": 1 + N}`: the *first*
descriptor is a file that holds the result's JSON. `hello` is the first request of a connection.
Both sides import this module; the daemon validates what it gets strictly against these types: unknown fields, wrong
types and missing fields are `invalid_params`. Fields are only ever appended, with defaults: a newer daemon serves an older SDK.
"""

# No `from __future__ import annotations`: NamedTuple would compile each one on its own, 2 ms of every import.
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20  # a line, its newline included; longer ones close the connection
MAX_DESCRIPTORS = 64  # a message
MAX_REQUESTS = 64  # running at the same time on one connection


class Hello(NamedTuple):
    """First request of a connection: versions are exchanged before anything else."""

    protocol: int
    client: str = ""  # for logs: "modelcache/0.1.0"


class HelloReply(NamedTuple):
    protocol: int
    version: str  # the daemon's
    root: str
    endpoint: str  # the hub it asks when a request names none
    private: bool  # a user's own daemon: it may end with the job's container
    pid: int


class Fetch(NamedTuple):
    """Asks for files of one repo; the reply's path shows exactly these. Reply: FetchReply (`plan`: PlanReply)."""

    repo_id: str  # "name" or "org/name"
    repo_type: str = "model"  # "model", "dataset" or "space"
    revision: str = "main"  # branch, tag, "refs/pr/1" or a full commit hash
    allow_patterns: Optional[List[str]] = None
    ignore_patterns: Optional[List[str]] = None
    filename: Optional[str] = None  # only this file, by its exact path in the repo; entry_not_found when it is not there
    token: Optional[str] = None  # the caller's own
    endpoint: Optional[str] = None  # None: the daemon's
    force_download: bool = False  # ask the hub now, re-hash what is here, fetch what fails
    local_files_only: bool = False  # no request to the hub
    held: List[str] = []  # trees on which this process already holds a lease: no second one is sent
    listing: bool = False  # also pass a descriptor of the commit's full listing
    purpose: str = ""  # shown beside the lease: a command line, a task's pathspec


class FetchReply(NamedTuple):
    """Descriptors: the lease (when `leased`), then the listing (when asked for).

    The listing is a JSON object {"commit": str, "files": [[path, size_bytes, git_oid, lfs_sha256 or null, xet_hash or null], ...]}.
    """

    path: str  # the view's folder
    device: int  # st_dev and st_ino of `path` as the daemon sees it
    inode: int
    tree: str
    commit: str
    files: int
    size_bytes: int
    hub_bytes: int  # how many of these bytes came from the hub while this caller waited
    seconds: float
    leased: bool  # False: the caller said it holds one
    warnings: List[str] = []
    private: bool = False  # or gated: the hub accepted the caller's token for it
    store_bytes: int = 0  # how many came from the store instead, where other nodes had put them


class PlanReply(NamedTuple):
    """What a Fetch with the same fields would do, without doing it (method `plan`, params: Fetch)."""

    commit: str
    tree: Optional[str]  # None: not known before the download
    files: List[List[Any]]  # [path, size_bytes, is_cached]


class Progress(NamedTuple):
    """How a long call is getting on; sent to everybody who waits, late joiners too."""

    phase: str  # "look up" | "list" | "download" | "verify" | "publish" | "paused"
    done_bytes: int = 0
    total_bytes: int = 0
    rate: float = 0.0  # bytes a second, over the last seconds
    source: str = ""  # "disk", "hub"
    done_files: int = 0
    total_files: int = 0
    waiters: int = 0  # callers that wait for the same files, this one included
    message: str = ""  # "hub asks to wait 30 s (429)"


class List_(NamedTuple):
    """What is on this node (method `ls`). Reply: {"repos": [Entry, ...]}."""

    repo_id: Optional[str] = None


class Entry(NamedTuple):
    repo_id: str
    repo_type: str
    endpoint: str
    revisions: List[str]  # names that point to this commit now
    commit: str
    tree: str
    files: int
    size_bytes: int
    path: str
    last_used: float  # seconds since the epoch
    leases: int


class Remove(NamedTuple):
    """Removes a repo (one revision of it) from this node (method `rm`). Reply: RemoveReply. `in_use` while held."""

    repo_id: str
    repo_type: str = "model"
    revision: Optional[str] = None  # None: all of them
    endpoint: Optional[str] = None


class RemoveReply(NamedTuple):
    trees: List[str]
    freed_bytes: int


class Verify(NamedTuple):
    """Re-hashes what is on this node (method `verify`), with progress. Reply: VerifyReply."""

    repo_id: Optional[str] = None  # None: every blob
    repo_type: str = "model"


class VerifyReply(NamedTuple):
    blobs: int
    size_bytes: int
    damaged: List[str]  # SHA-256 of blobs that lied: quarantined, fetched again when next asked for
    missing: List[str]  # SHA-256 of blobs that trees name and the disk has not


class Pin(NamedTuple):
    """Keeps a repo, or what was saved, on this node (method `pin`). Reply: "name", "what", "trees", "uid", "created", "expires"."""

    repo_id: Optional[str] = None
    repo_type: str = "model"
    revision: Optional[str] = None  # None: all that is here
    endpoint: Optional[str] = None
    key: Optional[str] = None  # instead of a repo
    store: Optional[str] = None
    trees: List[str] = []  # only these of them
    name: Optional[str] = None  # None: that of what is pinned; the same name again replaces the caller's pin
    seconds: Optional[float] = None  # None: for ever


class Pins(NamedTuple):
    """The caller's pins, of owners all there are (method `pins`). Reply: {"pins": [as pin replies, ...]}."""


class Unpin(NamedTuple):
    """Removes a pin (method `unpin`). Reply: {}."""

    name: str


class Evict(NamedTuple):
    """Frees room now (method `evict`). Owners only. Replies of this and of `explain` are described in docs/api.md."""

    size_bytes: Optional[int] = None  # that the cache may have afterwards; None: what its low watermark allows
    dry_run: bool = False


class Explain(NamedTuple):
    """Why something is on this node (method `explain`). Names a repo, a key, or a path in a view."""

    repo_id: Optional[str] = None
    repo_type: str = "model"
    revision: Optional[str] = None
    endpoint: Optional[str] = None
    key: Optional[str] = None
    store: Optional[str] = None
    path: Optional[str] = None


class Status(NamedTuple):
    """The daemon at a glance (method `status`). Reply: an object of plain values, documented in docs/api.md."""


class SaveOpen(NamedTuple):
    """Begins a save (method `save_open`). Reply: SaveOpened, with one descriptor: the save is dropped when its last copy is closed."""

    reference: Dict[str, Any]  # what `save` returns, as far as the client knows it; `key` and `type` at least
    files: int
    size_bytes: int
    storage_format: str = "files"  # "files" or "tar"
    durable: bool = False  # survives a power cut before `save_close` answers
    supersede: bool = False  # newer saves of the same name are sent to the store first
    store: Optional[str] = None  # None: the daemon's


class SaveOpened(NamedTuple):
    save: str  # names the save in the messages below


class SaveTree(NamedTuple):
    """Saves what this node shows already, and the caller holds a lease on: no byte is copied (method `save_tree`). Reply: SaveClosed."""

    reference: Dict[str, Any]  # as in SaveOpen
    tree: str
    store: Optional[str] = None


class SaveFiles(NamedTuple):
    """Hands over files, one descriptor each, read-only (method `save_files`). Reply: SaveFilesReply, when they are captured.

    A path that was handed over before, here or in a pack, is replaced: a file gives back its room, a pack with the last of its paths.
    """

    save: str
    files: List[Tuple[str, int, bool]]  # path, size in bytes, executable


class SaveFilesReply(NamedTuple):
    changed: List[int]  # which of them changed while they were copied: to be sent again


class SavePack(NamedTuple):
    """Hands over small files in one descriptor that holds them one after another (method `save_pack`). Reply: SaveFilesReply."""

    save: str
    files: List[Tuple[str, int, bool]]  # in the order of their bytes


class SaveLinks(NamedTuple):
    """Hands over links and empty folders that are too many for `SaveClose` (method `save_links`). Reply: {}."""

    save: str
    links: List[Tuple[str, str]] = []  # path, relative target
    folders: List[str] = []


class SaveClose(NamedTuple):
    """Ends a save: from here on it is kept (method `save_close`). Reply: SaveClosed. With `drop`, it is forgotten instead."""

    save: str
    links: List[Tuple[str, str]] = []  # path, relative target
    folders: List[str] = []  # empty ones
    drop: bool = False


class SaveClosed(NamedTuple):
    reference: Dict[str, Any]  # complete


class Load(NamedTuple):
    """Asks for what was saved (method `load`). Reply: LoadReply, with the lease as in FetchReply."""

    key: str
    store: Optional[str] = None
    held: List[str] = []
    purpose: str = ""


class LoadFolder(NamedTuple):
    """Asks for a folder of a store that no save made (method `load_folder`). Reply: LoadReply; its reference says nothing."""

    url: str  # of the folder: that of a store this daemon serves, and a path
    held: List[str] = []
    purpose: str = ""


class LoadReply(NamedTuple):
    path: str
    device: int
    inode: int
    tree: str
    files: int
    size_bytes: int
    store_bytes: int  # that came from the store while this caller waited
    seconds: float
    leased: bool
    reference: Dict[str, Any]
    warnings: List[str] = []


class References(NamedTuple):
    """What was saved, newest first (method `references`).

    Reply: {"references": [...], "pending": [their keys], "elsewhere": [...]}. Pending are those of the caller, saved on this node,
    that the store has not confirmed; elsewhere is what other nodes have announced, in the words of their pending records.
    """

    prefix: str = ""  # of the key
    type: Optional[str] = None  # "model" or "checkpoint"
    name: Optional[str] = None  # a model's label, a checkpoint's name
    store: Optional[str] = None
    limit: int = 10_000
    last: str = ""  # is in the key's last component; others are not even read


class DeleteReference(NamedTuple):
    """Takes a reference out of the store; its blobs go with the next garbage collection (method `delete`). Reply: {}."""

    key: str
    store: Optional[str] = None


class Flush(NamedTuple):
    """Waits until saves are in the store (method `flush`), with progress. Reply: FlushReply."""

    keys: Optional[List[str]] = None  # None: everything of this uid
    deadline_seconds: Optional[float] = None


class FlushReply(NamedTuple):
    pending: List[str]  # keys that are not in the store yet: the deadline passed
    error: str = ""  # the last one


class GcStore(NamedTuple):
    """Takes out of the store what nothing in it names any more (method `gc_store`), with progress. Reply: GcStoreReply. Owners only."""

    dry_run: bool = False
    alone: bool = False  # the caller knows that no other collection runs: some stores can't tell
    store: Optional[str] = None


class GcStoreReply(NamedTuple):
    """By kind ("blobs", "trees", "repos", "pending", and kept "references"): {"objects": n, "bytes": n}."""

    dry_run: bool
    deleted: Dict[str, Dict[str, int]]  # with `dry_run`, what would be
    kept: Dict[str, Dict[str, int]]
    orphans: int  # uploads that broke off, and temporary files, that were removed
    findings: List[Dict[str, str]]  # "key" of a reference and the "problem" it has
    keys: List[str]  # with `dry_run`, what would be deleted; at most 100,000
    seconds: float


class WatchOpen(NamedTuple):
    """Watches a folder in the daemon (method `watch`); carries a descriptor of the folder that it lies in. Reply: WatchOpened.

    The reply's descriptor is a socket, for the orders of `modelcache.watch_host`; there is none where the daemon has another uid.
    """

    directory: str  # for logs: it is never opened by this name
    name: str


class WatchOpened(NamedTuple):
    here: bool


class WatchTold(NamedTuple):
    """What a helper process tells of its watch, for `status` (method `watch_told`). It is forgotten after a minute. Reply: {}."""

    directory: str
    name: str
    where: str
    captured: int
    last_error: str
    is_over: bool = False
