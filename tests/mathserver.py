"""Ask addition questions over TCP, send a secret phrase, and log what goes wrong."""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import random
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

PAUSE = 0.01  # seconds of silence before each piece of a frame
HINT = 2  # seconds of silence until the log tells of it; also those after the secret
TRACEBACK = 1  # seconds at most that the log leaves a failed client to print why
LONELY = 5  # seconds until the log tells that nobody has connected
GRACE = 3  # seconds at most that clients may go on after the end of the command
LOG = logging.getLogger("mathserver")
integer = functools.partial(int.from_bytes, byteorder="big")


class ClientError(Exception):
    """What is wrong with a client, in words for its author."""


def additions(question: bytes, sums: List[int]) -> Iterator[Tuple[int, str]]:
    """Yield the sum of a question, then what usual mistakes make of it, by name."""
    first, second = struct.unpack("!xII", question)
    yield first + second, ""
    for bits in (8, 16, 24, 31, 32):
        yield (first + second) % 2**bits, f"wrapped modulo 2**{bits}"
    yield first, "only the first operand"
    yield second, "only the second operand"
    yield sum(struct.unpack("<xII", question)), "the operands read as little-endian"
    for some in (question[1:], question[1:3], question[1::4], question[4::4]):
        yield sum(some), "single bytes added"
    yield sum(struct.unpack("!xHHHH", question)), "pairs of bytes added"
    for n in range(2, 6):
        short = f"only its bytes [0:{n}] used; receive until all 9 are there"
        yield integer(question[1:n]), short
    parts = [(i, j) for i, j in itertools.combinations(range(10), 2) if j - i < 5]
    for (i, j), (k, n) in itertools.combinations_with_replacement(parts, 2):
        where = f"bytes [{i}:{j}] and [{k}:{n}] sliced or received, not [1:5] and [5:9]"
        if j - i + n - k > 2:  # many pairs of single bytes have the same sum
            yield integer(question[i:j]) + integer(question[k:n]), where
    for number, earlier in enumerate(sums, 1):
        yield earlier, f"the sum of question {number}"
    yield sum(sums) + first + second, "all sums so far added up"


def forms(total: int, question: bytes, answer: bytes) -> Iterator[Tuple[bytes, str]]:
    """Yield what usual mistakes send of a sum, by name, then the right 4 bytes."""
    n, right = len(answer), struct.pack("!I", total % 2**32)
    yield right + answer[4:], f"sent with {answer[4:][:32]!r} after it"
    yield answer[:-4] + right, f"sent with {answer[:-4][:32]!r} before it"
    yield question + right, "sent with the question before it"
    yield right * (n // 4), f"sent {n // 4} times"
    for order in ("big", "little"):
        yield (total % 256**n).to_bytes(n, order), f"sent {order}-endian in {n} bytes"
    end = answer[len(answer.rstrip(b"\r\n\0 ")) :]  # a newline, say
    yield repr(right).encode() + end, "sent as the text of a bytes object"
    for style in ("x", "#x", "08x", "X", "08X"):
        yield format(total, style).encode() + end, "sent as hexadecimal text"
    yield str(total).encode() + end, "sent as decimal text"
    yield question[-max(8, n) :], "the operands sent one after the other"
    yield right, ""


def explain_answer(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with an answer; `sums` are those of the questions before."""
    found: Dict[int, Set[str]] = {1: set(), 2: set()}  # by the number of mistakes
    for total, adding in additions(question, sums):
        names = dict(forms(total, question, answer))  # of two for one form, the last
        if answer in names:
            mistakes = [mistake for mistake in (adding, names[answer]) if mistake]
            found[len(mistakes)].add(", ".join(mistakes))
    causes = sorted(found[1] or found[2])
    why = ": " + "; or ".join(causes) if 0 < len(causes) < 4 else ""
    first, second = struct.unpack("!xII", question)
    right = struct.pack("!I", (first + second) % 2**32)
    came = integer(answer) if len(answer) == 4 else f"{len(answer)} bytes"
    equation = f"{first} + {second} is {integer(right)} ({right!r})"
    return f"{equation}, not {came} ({answer[:32]!r}){why}"


def explain_leaving(sent: bytes, answer: bytes, sums: List[int], unread: bool) -> str:
    """Return what is wrong with leaving after these bytes, or ""; a reset: `unread`."""
    if sums and not sent:
        return f"left after right answer {len(sums)}; go on until a frame begins with S"
    if len(sent) < 9 or unread:
        return "left before reading all 9 bytes; receive until all are there, each time"
    if sent.startswith(b"S"):
        return ""
    first, second = struct.unpack("!xII", sent)
    read = "read" if sys.platform == "linux" else "was sent"  # else no reset tells
    words = f"{read} all 9 bytes and left with {len(answer)} of 4 sent: it failed at"
    if sums and max(sums) < 2**31 <= first + second:
        return f"{words} the first sum too big for a signed integer, {first} + {second}"
    return f"{words} {first} + {second}, waited for more or took it for the secret"


class Conversation(threading.Thread):
    """One client's questions and answers, and the secret phrase if all are right."""

    def __init__(self, client: Any, secret: bytes, ended: threading.Event) -> None:
        (self.sock, address), self.secret, self.ended = client, secret, ended
        super().__init__(name="%s port %s" % address[:2], daemon=True)
        self.sums: List[int] = []  # the right answers so far
        self.hinted = False

    def run(self) -> None:
        """Hold the conversation, and log what is wrong with the client, if anything."""
        try:
            with self.sock:
                for number in range(1, random.randint(5, 12) + 1):
                    self.stage = f"{self.name}: question {number}"
                    self.ask()
                self.stage = f"{self.name}: secret"
                LOG.info("%s: %r for %s right answers", self.stage, self.secret, number)
                self.send(b"S" + self.secret)
                self.sock.shutdown(socket.SHUT_WR)
                more = self.receive(HINT)
            wrong = f"{more[:32]!r} came after it; S is no question" if more else ""
        except ClientError as error:
            wrong = str(error)
        except (EOFError, OSError) as error:
            unread = isinstance(error, OSError)
            wrong = explain_leaving(self.sent, self.answer, self.sums, unread)
        if wrong:
            self.ended.wait(TRACEBACK)
            LOG.info("%s: %s", self.stage, wrong)

    def ask(self) -> None:
        """Ask a question and take its answer; raise ClientError if that is wrong."""
        first, second = random.randrange(2**31), random.randrange(2**31)
        self.send(struct.pack("!cII", b"Q", first, second))
        while len(self.answer) < 4:
            piece = self.receive(None if self.hinted else HINT)
            if not piece:
                self.hinted = True
                count = f"{len(self.answer)} of its 4 have come"
                hint = f"all 9 bytes are sent, no more comes before the answer; {count}"
                LOG.info("%s: silent for %s s: %s", self.stage, HINT, hint)
            self.answer += piece
        with contextlib.suppress(EOFError, OSError):
            self.answer += self.receive(PAUSE)  # more than the answer, if it comes
        if self.answer != struct.pack("!I", first + second):
            raise ClientError(explain_answer(self.sent, self.answer, self.sums))
        self.sums.append(first + second)

    def send(self, frame: bytes) -> None:
        """Send a frame in 2 to 4 pieces; raise ClientError if it is not awaited."""
        self.sent = self.answer = b""
        # Else the kernel would join the pieces.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for end in (*sorted(random.sample(range(1, 9), random.randint(1, 3))), 9):
            early = self.receive(PAUSE)
            came = f"{early[:32]!r} came when {len(self.sent)} of 9 bytes had been sent"
            if len(early) == 4:
                raise ClientError(f"too early: {came}; receive until all are there")
            if early:
                raise ClientError(f"unasked: {came}; the server speaks first")
            self.sock.settimeout(None)
            self.sock.sendall(frame[len(self.sent) : end])
            self.sent = frame[:end]

    def receive(self, seconds: Optional[float]) -> bytes:
        """Return what comes in time, b"" if nothing; raise an error at the end."""
        self.sock.settimeout(seconds)
        try:
            data: bytes = self.sock.recv(1024)
        except socket.timeout:
            return b""
        if not data:
            reset = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise ConnectionResetError if reset else EOFError  # reset: not all read
        return data


def serve(server: socket.socket, secret: bytes, process: Any) -> None:
    """Hold a conversation with each client, until `process`, if any, has ended."""
    ended, start, deadline = threading.Event(), time.monotonic(), float("inf")
    port, lonely = server.getsockname()[1], True  # until somebody has connected
    server.settimeout(0.05 if process else None)  # to look whether it has ended
    while time.monotonic() < deadline:
        if process and process.poll() is not None:
            ended.set()
            deadline = min(deadline, time.monotonic() + GRACE)
        try:
            Conversation(server.accept(), secret, ended).start()
        except socket.timeout:
            if lonely and (ended.is_set() or time.monotonic() > start + LONELY):
                LOG.info("nobody has connected to port %s over TCP", port)
                lonely = False
            if ended.is_set():
                break
            continue
        except (OSError, RuntimeError) as error:  # no more files or threads
            LOG.error("cannot serve a client: %s", error)
            time.sleep(1)
        lonely = False
    for thread in {*threading.enumerate()} - {threading.current_thread()}:
        thread.join(max(0, deadline - time.monotonic()))


def main() -> None:
    """Serve as the command line says, and exit with the command's status."""
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
    if not 0 <= args.port <= 65535:
        parser.error(f"argument --port: {args.port} is not from 0 to 65535")
    if args.command[:1] == ["--"]:
        del args.command[0]
    logging.basicConfig(level=logging.INFO, format="mathserver.py: %(message)s")
    try:
        found: Any = socket.getaddrinfo(args.bind, args.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        server = socket.create_server(address, family=family, backlog=4096)
    except (OSError, UnicodeError) as error:  # the last of whose args are words
        sys.exit(f"mathserver.py: cannot listen on {args.bind}: {error.args[-1]}")
    LOG.info("listening on %s port %s", *server.getsockname()[:2])
    try:
        process: Any = subprocess.Popen(args.command) if args.command else None
    except OSError as error:
        LOG.error("cannot run %r: %s", args.command[0], error.strerror)
        os._exit(127)
    serve(server, secrets.token_urlsafe(6).encode(), process)
    code = process.returncode  # below 0 for a signal, and on Windows unsigned
    os._exit(128 - code if code < 0 else (code + 2**31) % 2**32 - 2**31)


if __name__ == "__main__":
    main()
