"""What the tests share: an end in time, a recorded socket, and running processes."""

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Iterable, Iterator, List, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-S", "-W", "error")  # -S: without installed packages
POSIX = unittest.skipUnless(os.name == "posix", "POSIX only")
# Python's own variables would change what the processes print, but some interpreters
# do not start without PYTHONHOME.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name == "PYTHONHOME" or not name.startswith("PYTHON")
}
ENVIRONMENT.update({"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUTF8": "1"})


class TestCase(unittest.TestCase):
    """A test that ends in time, whatever is broken."""

    maxDiff = None
    patience = 20.0  # seconds until a test gives up on what takes a second at most

    def setUp(self) -> None:
        if "pydevd" not in sys.modules:  # in a debugger, a test may stop for longer
            faulthandler.dump_traceback_later(60, exit=True, file=2)
            self.addCleanup(faulthandler.cancel_dump_traceback_later)


class Outcome(NamedTuple):
    """What a process leaves."""

    stdout: str
    stderr: str
    status: int


class RecordedSocket(socket.socket):
    """A real socket that records what each recv returns and each sendall sends.

    A recv ends at the next of `stops`, which are positions in the stream. The third
    recv after the end raises AssertionError, so that a loop without an exit fails.
    """

    def __init__(self, sock: socket.socket, stops: Iterable[int] = ()) -> None:
        super().__init__(fileno=sock.detach())
        self.stops = list(stops)
        self.received: List[bytes] = []
        self.sent: List[bytes] = []

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if self.received[-2:] == [b"", b""]:
            raise AssertionError("recv is called again and again after the end")
        position = sum(map(len, self.received))
        ahead = [stop - position for stop in self.stops if stop > position]
        self.received.append(super().recv(min([size, *ahead]), flags))
        return self.received[-1]

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self.sent.append(bytes(data))
        super().sendall(data, flags)


def heed_ctrl_c(test: TestCase) -> None:
    """Let the processes of a test get SIGINT, even if it is ignored or blocked here."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    test.addCleanup(signal.signal, signal.SIGINT, handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    test.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def started(*command: Any, **options: Any) -> Iterator[Any]:
    """Start a command; kill it if it still runs after the block, or hangs in it.

    If the block fails, say what the process has left in its pipes.
    """
    line = [str(word) for word in command]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = {**pipes, "bufsize": 0, "env": ENVIRONMENT, "cwd": ROOT, **options}
    limit = TestCase.patience
    process: Any
    with subprocess.Popen(line, **options) as process:

        def give_up() -> None:
            TestCase.patience = 2  # for what hangs after this
            process.kill()
            process.stdin.close()  # so that the command of a server ends, too

        watchdog = threading.Timer(limit, give_up)
        watchdog.start()
        try:
            yield process
            if not watchdog.is_alive():
                raise AssertionError(f"killed after {limit} s")
        except Exception as error:
            process.kill()
            raise AssertionError(f"{line} left {finish(process)}") from error
        finally:
            watchdog.cancel()
            process.kill()


def finish(process: Any, stdin: str = "") -> Outcome:
    """Wait for the end of a process."""
    if process.stdin.closed:
        process.stdin = None  # which communicate expects then
    ends = process.communicate(stdin.encode())
    stdout, stderr = ((end or b"").decode().replace(os.linesep, "\n") for end in ends)
    return Outcome(stdout, stderr, process.returncode)


def run(*command: Any, **options: Any) -> Outcome:
    """Run a command to its end."""
    with started(*command, **options) as process:
        return finish(process)
