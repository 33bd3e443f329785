#!/usr/bin/env python3
"""Ask addition questions over TCP, send a secret phrase, and log what goes wrong."""

import argparse
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
from typing import Any, Iterator, List, Optional

PAUSE = 0.01  # seconds between the pieces of a frame
HINT, LIMIT = 5, 600  # seconds of silence until the log tells of it, and until the end
GRACE = 3  # seconds at most that clients may delay the end after the command's
LOG = logging.getLogger("mathserver")


class Conversation(socketserver.BaseRequestHandler):
    """One client's questions and answers, and the secret phrase if all are right."""

    request: socket.socket
    server: "MathServer"

    def handle(self) -> None:
        """Hold the conversation, and log how it ended."""
        count, self.patience = random.randint(*self.server.questions), HINT
        try:
            for number in range(1, count + 1):
                self.stage = f"question {number}"
                self.ask()
            self.stage = "secret"
            success = f"{self.server.secret!r}, for {count} right answers"
            self.send(b"S" + self.server.secret, success)
        except ValueError as mistake:
            self.log(str(mistake))

    def ask(self) -> None:
        """Ask a question and take the answer; raise ValueError if it is not right."""
        first, second = random.randrange(2**31), random.randrange(2**31)
        operands = struct.pack("!II", first, second)
        right = struct.pack("!I", first + second)
        self.send(b"Q" + operands)
        answer = self.receive_answer()
        if answer != right:
            misread = struct.pack("<I", sum(struct.unpack("<II", operands)) % 2**32)
            mirrored = answer in (right[::-1], misread, misread[::-1])
            note = ", which is little-endian" if mirrored else ""
            total = f"{first} + {second} is {first + second}, in 4 bytes {right!r}"
            raise ValueError(f"{total}, not {answer!r}{note}")

    def receive_answer(self) -> bytes:
        """Return what comes, at least 4 bytes; raise ValueError if fewer do."""
        answer = b""
        while len(answer) < 4:
            piece = self.receive(self.patience)
            count = f"{len(answer)} of the 4 bytes of the answer: {answer!r}"
            if piece is None and self.patience == HINT:
                self.log(f"still waiting after {count}")
                self.patience = LIMIT - HINT  # the log tells of it once
            elif not piece:
                ending = f"silent for {LIMIT} s" if piece is None else "left"
                raise ValueError(f"{ending} after {count}")
            answer += piece or b""
        return answer + (self.receive(self.server.pause) or b"")

    def send(self, frame: bytes, success: str = "") -> None:
        """Send a frame, 9 bytes; raise ValueError if the client does not await it."""
        count = random.randint(1, 3) if self.server.pause else 0
        cuts = sorted(random.sample(range(1, 9), count))
        for start, end in zip([0, *cuts], [*cuts, 9]):
            early = self.receive(PAUSE if start else 0)
            if early is not None:
                what = f"too early: {early!r} came" if early else "left"
                what += f" when only {start} of its 9 bytes had been sent"
                raise ValueError(what + "; receive until all are there" * (start > 0))
            if success and end == 9:
                self.log(success)
            with contextlib.suppress(OSError):  # receive() tells that the client left
                self.request.sendall(frame[start:end])

    def receive(self, seconds: float) -> Optional[bytes]:
        """Return what comes in this time, b"" if the client leaves, None if nothing."""
        self.request.settimeout(seconds)
        try:
            return self.request.recv(1024)
        except (socket.timeout, BlockingIOError):
            return None
        except OSError:  # a reset, say
            return b""

    def log(self, text: str) -> None:
        LOG.info("%s port %s: %s: %s", *self.client_address[:2], self.stage, text)


class MathServer(socketserver.ThreadingTCPServer):
    """A server that listens once it is made, on any free port if `port` is 0.

    Each conversation has `questions` questions, 5 to 12 if that is None, and ends with
    the 8-byte `secret`. Raise OSError or UnicodeError if it cannot listen on `host`.
    """

    allow_reuse_address = os.name == "posix"  # Windows would share a port that is taken
    request_queue_size = 512  # connections that may wait to be accepted

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        questions: Optional[int] = None,
        whole_frames: bool = False,
    ) -> None:
        self.secret = secret
        self.questions = (5, 12) if questions is None else (questions, questions)
        self.pause = 0 if whole_frames else PAUSE
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, Conversation)
        # Each connection inherits it; else the kernel would join the pieces of a frame.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve in a thread while the block runs, and whoever has connected by then."""
        threading.Thread(target=self.serve_forever, args=[0.05]).start()
        try:
            yield
        finally:
            self.shutdown()
            self.socket.setblocking(False)
            with contextlib.suppress(OSError):  # raised once nobody waits
                while True:
                    self.process_request(*self.get_request())


def run(command: List[str]) -> int:
    """Run `command`; return its status, 128 + N for a signal, 127 if it cannot run."""
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        LOG.error("cannot run %r: %s", command[0], error.strerror)
        return 127
    return status if status >= 0 else 128 - status


def main() -> int:
    """Serve as the command line says, and return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--bind", metavar="ADDRESS", default="127.0.0.1", help="address to listen on"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="serve while it runs")
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:  # else taken modulo 65536
        parser.error(f"argument --port: {args.port} is not from 0 to 65535")
    if args.command[:1] == ["--"]:
        del args.command[0]
    logging.basicConfig(level=logging.INFO, format="mathserver.py: %(message)s")
    try:
        server = MathServer(args.bind, args.port, secrets.token_urlsafe(6).encode())
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "not a valid host name")
        LOG.error("cannot listen on %s port %s: %s", args.bind, args.port, reason)
        return 1
    with server:
        LOG.info("listening on %s port %s", *server.server_address[:2])
        if not args.command:
            server.serve_forever()  # until a signal ends the process
        with server.serving():
            status = run(args.command)
            # Leaving these blocks waits for all conversations, but not for ever.
            limit = threading.Timer(GRACE, os._exit, [status])
            limit.daemon = True
            limit.start()
    return status


if __name__ == "__main__":
    sys.exit(main())
