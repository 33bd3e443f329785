"""What the tests share: a socket that records its traffic, and running processes."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 20  # seconds until a test gives up on what takes a second at most
PYTHON = (sys.executable, "-S", "-W", "error")  # -S: without installed packages
LAB4 = (*PYTHON, ROOT / "lab4.py")
LINGER = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, LINGER)  # a close resets the connection
try:
    socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    IPV6 = unittest.skipIf(False, "")
except OSError as error:
    IPV6 = unittest.skip(f"this machine has no ::1: {error}")
POSIX = unittest.skipUnless(os.name == "posix", "POSIX only")
# The tests must not depend on PYTHON variables, but some interpreters need PYTHONHOME.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
ENVIRONMENT.update({k: v for k, v in os.environ.items() if k == "PYTHONHOME"})
ENVIRONMENT.update({"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUTF8": "1"})
ENVIRONMENT.update({"PYTHONIOENCODING": "utf-8", "RES_OPTIONS": "attempts:1 timeout:1"})
socket.setdefaulttimeout(TIMEOUT - 5)  # before the process at the other end is killed


class RecordedSocket(socket.socket):
    """A real socket that records what each recv returns and each sendall sends.

    A recv does not read past a stop, which is a position in the stream. The third
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


@contextlib.contextmanager
def started(*line: Any, **options: Any) -> Iterator[Any]:
    """Start a command line; kill what still runs after the block, or after TIMEOUT."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = {**pipes, "bufsize": 0, "env": ENVIRONMENT, "cwd": ROOT, **options}
    process: Any
    with subprocess.Popen([*map(str, line)], **options) as process:

        def give_up() -> None:
            process.kill()
            process.stdin.close()  # so that its children end, too

        watchdog = threading.Timer(TIMEOUT, give_up)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def finish(process: Any, stdin: bytes = b"") -> Tuple[bytes, str, int]:
    """Wait for the end of a process; return its stdout, stderr and exit status."""
    stdout, stderr = process.communicate(stdin, TIMEOUT)
    return stdout or b"", stderr.decode().replace(os.linesep, "\n"), process.returncode


def run(*line: Any) -> Tuple[bytes, str, int]:
    """Run a command line to its end; return its stdout, stderr and exit status."""
    with started(*line) as process:
        return finish(process)
