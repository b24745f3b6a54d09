"""Runs a command in the place of `modelcache`: its signals are the command's, and its end is ours.

While the command runs this process only waits: signals that were meant for it go on to the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Dict, List, NamedTuple, Sequence, Set

from .cli_show import BY_SIGNAL, CANNOT_RUN, NO_SUCH_COMMAND

PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_SI_KERNEL = 0x80  # si_code of a signal from the terminal, which the command got as well: it is in the same group


def heeded(signals: Set[signal.Signals]) -> Set[signal.Signals]:
    """Without those that whoever started us wants ignored, as `nohup` and a shell's `&` do: such a signal is none, for the command too."""
    return {number for number in signals if signal.getsignal(number) is not signal.SIG_IGN}


class Ended(NamedTuple):
    code: int  # as a shell gives it
    was_told: bool  # by a signal that means the end, whether the command heeded it or not


def run(program: Sequence[str], environment: Dict[str, str], inherited: Sequence[int] = ()) -> Ended:
    """Runs the command until it ends. Afterwards those of PASSED_ON that are heeded are still blocked, so that the caller can end in order.

    Other threads of this process have to block them too: the kernel takes any thread that does not.
    """
    waited_for = heeded(PASSED_ON) | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)  # from here on none is lost, and none interrupts us
    # One that is ignored, as some supervisors leave it, would never come, and the kernel would keep the command's end from us. The command
    # begins with the default too, which is what shells and Python's own subprocess count on.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.SIGTERM in waited_for:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    try:
        command = subprocess.Popen(
            program,
            env=environment,
            close_fds=False,  # what our caller handed down is the command's; what Python opens is not inherited anyway
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
        )
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError) and "/" not in program[0]
        print("modelcache: error: %s: %s" % (program[0], "command not found" if is_missing else error.strerror), file=sys.stderr)
        return Ended(NO_SUCH_COMMAND if isinstance(error, FileNotFoundError) else CANNOT_RUN, False)
    for descriptor in inherited:
        os.set_inheritable(descriptor, False)
    got: List[int] = []
    while command.poll() is None:
        found = signal.sigwaitinfo(waited_for)
        if found.si_signo != signal.SIGCHLD:
            got.append(found.si_signo)
            if found.si_code != _SI_KERNEL:
                command.send_signal(found.si_signo)
    code = command.returncode
    return Ended(code if code >= 0 else BY_SIGNAL - code, bool(ENDING.intersection(got)))
