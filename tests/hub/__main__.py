"""`python -m tests.hub`: runs the hub's hosts until SIGTERM (or, with --with-stdin, until stdin ends: no orphan outlives its test).

The first line on stdout is JSON: {"endpoint": ..., "lfs": ..., "control": ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from aiohttp import web

from .api import Api, Settings
from .content import Shelf
from .control import Control
from .faults import Faults
from .lfs import LfsHost, Signer
from .repos import Catalogue
from .wire import Host


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description="A local hub that speaks the Hugging Face Hub's HTTP protocol")
    parser.add_argument("--state", type=Path, required=True, help="folder for large files; kept")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--lfs-address", default="127.0.0.2", help="where the second host listens: another host for every client")
    parser.add_argument("--lfs-url", help="another process on the same --state is the second host")
    parser.add_argument("--role", choices=("hub", "lfs"), default="hub", help="lfs: be only the second host")
    parser.add_argument("--page-size", type=int, default=1000, help="rows of a listing's page")
    parser.add_argument("--url-seconds", type=float, default=3600.0, help="how long a signed address is good")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes of files a second, all connections together; 0: no limit")
    parser.add_argument("--resolve-cache", action="store_true", help="small files behind one more relative redirect, as the real hub does")
    parser.add_argument("--with-stdin", action="store_true", help="end when stdin does")
    return parser


async def _run(options: argparse.Namespace) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if options.with_stdin:
        loop.add_reader(sys.stdin.fileno(), ended.set)
    options.state.mkdir(parents=True, exist_ok=True)
    shelf, signer, faults, catalogue = Shelf(options.state), Signer(options.state), Faults(options.rate), Catalogue()
    hosts: list[Host] = []
    lfs_url = options.lfs_url
    if lfs_url is None:
        lfs = Host("lfs", options.lfs_address, LfsHost(shelf, signer), faults)
        await lfs.start(options.port if options.role == "lfs" else 0)
        lfs_url = lfs.url
        hosts.append(lfs)
    endpoint = lfs_url
    if options.role == "hub":
        settings = Settings(options.page_size, options.url_seconds, options.resolve_cache)
        hub = Host("hub", "127.0.0.1", Api(catalogue, signer, settings, lfs_url), faults)
        await hub.start(options.port)
        endpoint = hub.url
        hosts.append(hub)
    control = web.ServerRunner(web.Server(Control(catalogue, shelf, faults, hosts)))
    await control.setup()
    site = web.TCPSite(control, "127.0.0.1", 0)
    await site.start()
    control_url = f"http://127.0.0.1:{control.addresses[0][1]}"
    print(json.dumps({"endpoint": endpoint, "lfs": lfs_url, "control": control_url}), flush=True)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_run(_parser().parse_args()))
