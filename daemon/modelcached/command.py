"""The `modelcached` command: flags, signals, and the order in which things end.

`serve` ends in order: no new connections, running requests get `shutdown_seconds`, then they are cancelled; after the
connections end the flights, then the background tasks, then what they used. A background task that dies ends the daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextvars import Context
from typing import Any, NoReturn, Protocol, TypeVar

from modelcache.protocol import PROTOCOL_VERSION

from . import __version__, arguments, config, install, listen, logs
from .admission import Admission
from .config import Config, ConfigError
from .connection import Service, Traffic
from .errors import InUse, ModelcachedError
from .notify import Notifier
from .server import Server

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_TEMPORARY = 0, 1, 2, 75  # explained in arguments.EPILOG
OVERTIME_SECONDS = 30.0  # beyond shutdown_seconds: a thread that hangs in the kernel must not keep the daemon for ever
SPARE_DESCRIPTORS = 512  # files, leases on their way, connections to the hub

T = TypeVar("T")

logger = logging.getLogger("modelcached")


class Builder(Protocol):
    """Makes the service: opens the root, starts what runs in the background, and in `callers` what asks for flights there: it ends
    before them. Registers with `closing` what has to be closed after every task has ended. `traffic` tells, at any time, how many
    connections and requests there are."""

    def __call__(
        self,
        config: Config,
        background: asyncio.TaskGroup,
        flights: asyncio.TaskGroup,
        callers: asyncio.TaskGroup,
        closing: contextlib.AsyncExitStack,
        traffic: Traffic,
    ) -> Awaitable[Service]: ...


def main(words: Sequence[str] | None = None, build: Builder | None = None) -> int:
    asked = arguments.parser().parse_args(words)
    if asked.command == "version":
        return _version(asked.json)
    if asked.command == "install":
        return _install(asked)
    try:
        settings = arguments.settings(asked)
    except ConfigError as error:
        return _report_problems(error, as_json=getattr(asked, "json", False))
    if asked.command == "check-config":
        return _show(settings, asked.json)
    logs.start(asked.log_format, asked.log_level)
    return serve(settings, build or _build_service(), lambda: arguments.settings(asked))


def _build_service() -> Builder:
    """Imported when it is needed: the hub's client takes longer to import than the other commands to run."""
    from .build import build_service

    return build_service


# ---- serve


def serve(settings: Config, build: Builder, reread: Callable[[], Config]) -> int:
    """Runs until told to end; the exit code. `reread` gives the configuration as it is by now."""
    faulthandler.enable()
    os.umask(0o022)
    _raise_descriptor_limit(settings.max_connections)
    notifier = Notifier.take_from(os.environ)
    try:
        listener = listen.adopt(os.environ) or _bind(settings)
        with contextlib.closing(listener):
            asyncio.run(_serve(settings, build, listener, notifier, reread))
    except listen.ListenError as error:
        return _fail(error.message, error.hint, EXIT_FAILED)
    except Exception as error:
        cause = _only(error)
        if isinstance(cause, ModelcachedError | listen.ListenError):
            return _fail(cause.message, cause.hint, EXIT_TEMPORARY if isinstance(cause, InUse) else EXIT_FAILED)
        logger.critical("the daemon failed", exc_info=error)
        return EXIT_FAILED
    logger.info("ended")
    return EXIT_OK


async def _serve(
    settings: Config, build: Builder, listener: listen.Listener, notifier: Notifier, reread: Callable[[], Config]
) -> None:
    stop = asyncio.Event()
    _end_on_signals(stop, settings.shutdown_seconds)
    notifier.status("starting")
    # The nesting is the order of the end, from the inside.
    async with (
        contextlib.AsyncExitStack() as closing,
        Background() as background,
        asyncio.TaskGroup() as flights,
        Background() as callers,
    ):
        traffic = Traffic()
        service = await build(settings, background, flights, callers, closing, traffic)
        async with asyncio.TaskGroup() as connections:
            server = Server(service, listener.socket, traffic, settings.max_connections, Admission.of(settings))
            server.start(connections)
            if notifier.watchdog_seconds:
                _ = background.create_task(_be_watched(notifier, notifier.watchdog_seconds))
            if settings.idle_exit is not None:
                _ = background.create_task(_stop_when_idle(server, service, settings.idle_exit, stop, settings.shutdown_seconds))
            logger.info("ready", extra={"version": __version__, "socket": listener.path or "passed in", "root": settings.root})
            notifier.ready()
            notifier.status("serving")
            _reload_on_signal(settings, service, notifier, reread)
            await stop.wait()
            server.stop_accepting()
            listener.close()
            notifier.stopping(settings.shutdown_seconds + OVERTIME_SECONDS)
            notifier.status("ending")
            logger.info("ending", extra=traffic.counts())
            await server.drain(settings.shutdown_seconds)


class Background(asyncio.TaskGroup):
    """Tasks that run as long as the daemon: leaving the group ends them, and one that fails ends the daemon."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def __aexit__(self, *raised: Any) -> None:
        for task in tuple(self._running):
            task.cancel()
        await super().__aexit__(*raised)


def _end_on_signals(stop: asyncio.Event, shutdown_seconds: float) -> None:
    def asked(number: int) -> None:
        logger.info("asked to end", extra={"signal": signal.Signals(number).name})
        if stop.is_set():
            logger.warning("asked again: ending at once")
            os._exit(EXIT_FAILED)  # what is on disk is sound at any time
        _begin_to_end(stop, shutdown_seconds)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked, number)


def _reload_on_signal(settings: Config, service: Service, notifier: Notifier, reread: Callable[[], Config]) -> None:
    """SIGHUP: the configuration is read again, and what can be changed while the daemon runs counts at once."""

    def reload() -> None:
        nonlocal settings
        notifier.reloading()
        try:
            read = reread()
        except ConfigError as error:  # the old one goes on
            for problem in error.problems:
                logger.error("the configuration is not taken over", extra={"problem": str(problem)})
        else:
            at_once, later = config.changes(settings, read)
            settings = config.reloaded(settings, read)
            service.reload(settings)
            logger.info("reloaded", extra={"changed": at_once, "need_a_restart": later})
        notifier.ready()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _begin_to_end(stop: asyncio.Event, shutdown_seconds: float) -> None:
    stop.set()
    overtime = threading.Timer(shutdown_seconds + OVERTIME_SECONDS, _end_overtime, [asyncio.get_running_loop()])
    overtime.daemon = True
    overtime.start()


def _end_overtime(loop: asyncio.AbstractEventLoop) -> NoReturn:
    waiting = sorted(" > ".join(_calls(task)) for task in asyncio.all_tasks(loop))
    logger.critical("something does not end: ending without it", extra={"tasks": waiting})
    faulthandler.dump_traceback()
    os._exit(EXIT_FAILED)


def _calls(task: asyncio.Task[Any]) -> Iterator[str]:
    """The functions that a task is in, from the outside; the last one is what it waits for."""
    inner: Any = task.get_coro()
    while inner is not None:
        yield getattr(inner, "__qualname__", None) or repr(inner)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)


async def _be_watched(notifier: Notifier, seconds: float) -> None:
    while True:
        notifier.alive()
        await asyncio.sleep(seconds / 2)


async def _stop_when_idle(server: Server, service: Service, seconds: float, stop: asyncio.Event, shutdown_seconds: float) -> None:
    await server.idle(seconds)
    while service.is_busy:
        await asyncio.sleep(seconds)
        await server.idle(seconds)
    logger.info("idle", extra={"seconds": seconds})
    _begin_to_end(stop, shutdown_seconds)


def _bind(settings: Config) -> listen.Listener:
    assert settings.socket is not None
    return listen.bind(settings.socket, settings.private)


def _raise_descriptor_limit(max_connections: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < max_connections + SPARE_DESCRIPTORS:
        logger.warning("few descriptors", extra={"limit": hard, "max_connections": max_connections})


def _only(error: BaseException) -> BaseException:
    """The one exception that a nest of task groups is about."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _fail(message: str, hint: str, code: int) -> int:
    logger.error(message, extra={"hint": hint} if hint else {})
    return code


# ---- the other commands


def _version(as_json: bool) -> int:
    known = {"version": __version__, "protocol": PROTOCOL_VERSION, "python": sys.version.split()[0]}
    print(json.dumps(known) if as_json else f"modelcached {__version__} (protocol {PROTOCOL_VERSION}, Python {known['python']})")
    return EXIT_OK


def _show(settings: Config, as_json: bool) -> int:
    if as_json:
        plain = {name: {"value": config.as_plain(getattr(settings, name)), "origin": settings.origins[name]} for name in config.SETTINGS}
        print(json.dumps(plain, indent=2))
        return EXIT_OK
    lines = {name: f"{name} = {config.as_toml(field, getattr(settings, name))}" for name, field in config.SETTINGS.items()}
    width = max(map(len, lines.values()))
    for name, line in lines.items():
        print(f"{line:{width}}  # {settings.origins[name]}")
    return EXIT_OK


def _install(asked: argparse.Namespace) -> int:
    try:
        if asked.user:
            done = install.install_for_user(os.environ, asked.program)
        else:
            done = install.install_for_host(asked.root.absolute(), asked.prefix.absolute(), asked.program)
    except install.InstallError as error:
        print(f"modelcached: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return EXIT_FAILED
    if asked.json:
        print(json.dumps({"files": [str(path) for path in done.files], "next": done.next}, indent=2))
        return EXIT_OK
    print(*done.files, sep="\n", flush=True)
    print(f"next: {done.next}", file=sys.stderr)
    return EXIT_OK


def _report_problems(error: ConfigError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"problems": [problem._asdict() for problem in error.problems]}, indent=2))
    for problem in error.problems:
        print(f"modelcached: {problem}", file=sys.stderr)
    print(f"hint: {len(error.problems)} to mend; modelcached serve --help lists every field", file=sys.stderr)
    return EXIT_USAGE
