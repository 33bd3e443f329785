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
from typing import Any, Iterator, List, Optional, Set, Tuple

PAUSE = 0.01  # seconds of silence before each piece of a frame, and after an answer
HINT = 2  # seconds without an answer until the log says so
WATCH = 2  # seconds after the secret in which the client should send nothing more
TRACEBACK = 1  # seconds at most that the log waits for a failed client to print why
LONELY = 5  # seconds without a client until the log says so
GRACE = 3  # seconds at most that clients may go on after the command has ended
LIMIT = 1024  # bytes of an answer that are looked at
LOG = logging.getLogger("mathserver")
integer = functools.partial(int.from_bytes, byteorder="big")


class Conversation(threading.Thread):
    """One client's questions and answers, and the secret phrase if all are right."""

    def __init__(self, client: Any, secret: bytes, ended: threading.Event) -> None:
        self.sock, address = client
        super().__init__(name="%s port %s" % address[:2], daemon=True)
        self.secret = secret
        self.ended = ended  # set when the command that is served has ended
        self.stage = ""  # what the log calls this point of the conversation
        self.pieces: List[bytes] = []  # what has been sent of the current frame
        self.answer = b""  # what has come since then
        self.sums: List[int] = []  # the right answers so far
        self.hinted = False  # true once the log has told of a silence

    def run(self) -> None:
        """Hold the conversation, and log what is wrong with the client, if anything."""
        try:
            with self.sock:
                # Otherwise the kernel may join the pieces of a frame.
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                for number in range(1, random.randint(5, 12) + 1):
                    self.stage = f"{self.name}: question {number}"
                    self.ask()
                self.stage = f"{self.name}: secret"
                LOG.info("%s: %r for %s right answers", self.stage, self.secret, number)
                self.send(b"S" + self.secret)
                self.sock.shutdown(socket.SHUT_WR)
                more = self.receive(WATCH)
            wrong = f"sent {more[:32]!r} after it: S is not a question" if more else ""
        except ValueError as error:
            wrong = str(error)
        except EOFError:
            wrong = explain_leaving(b"".join(self.pieces), self.answer, self.sums)
        except OSError:  # a reset: the client has left at least one byte unread
            wrong = explain_leaving(b"".join(self.pieces)[:-1], self.answer, self.sums)
        if wrong:
            self.ended.wait(TRACEBACK)
            LOG.info("%s: %s", self.stage, wrong)

    def ask(self) -> None:
        """Ask a question and take its answer; raise ValueError if that is wrong."""
        # The lab converts a sum into 4 bytes, so a question never needs to wrap.
        first, second = random.randrange(2**31), random.randrange(2**31)
        self.send(struct.pack("!cII", b"Q", first, second))
        while len(self.answer) < 4:
            piece = self.receive(None if self.hinted else HINT)
            if not piece:
                self.hinted = True
                hint = f"silent for {HINT} s: the client has been sent all 9 bytes"
                back = len(self.answer)
                LOG.info("%s: %s; %s of 4 bytes have come back", self.stage, hint, back)
            self.answer += piece
        with contextlib.suppress(EOFError, OSError):
            while len(self.answer) < LIMIT and (more := self.receive(PAUSE)):
                self.answer += more
        if self.answer != struct.pack("!I", first + second):
            raise ValueError(explain_answer(self.pieces, self.answer, self.sums))
        self.sums.append(first + second)

    def send(self, frame: bytes) -> None:
        """Send a frame in 2 to 4 pieces; raise ValueError if anything comes before."""
        self.pieces = []
        self.answer = b""
        cuts = sorted(random.sample(range(1, 9), random.randint(1, 3)))
        for start, end in zip([0, *cuts], [*cuts, 9]):
            if early := self.receive(PAUSE):
                raise ValueError(explain_early(start, early))
            self.sock.sendall(frame[start:end])
            self.pieces.append(frame[start:end])

    def receive(self, seconds: Optional[float]) -> bytes:
        """Return what comes in time, or b""; raise EOFError at the end, or OSError."""
        self.sock.settimeout(seconds)
        try:
            data: bytes = self.sock.recv(LIMIT - len(self.answer))
        except socket.timeout:
            return b""
        if not data:  # for a reset, too, if an end came before it
            reset = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise ConnectionResetError if reset else EOFError
        return data


def serve(server: socket.socket, secret: bytes, process: Any) -> None:
    """Hold a conversation with each client until `process` ends; for ever if None."""
    ended = threading.Event()
    start = time.monotonic()
    deadline = float("inf")
    lonely = True  # until a client has connected
    server.settimeout(0.05 if process else None)  # how often to look at the process
    while time.monotonic() < deadline:
        if process and process.poll() is not None and not ended.is_set():
            ended.set()
            deadline = time.monotonic() + GRACE
        client: Any = ()  # not the one before, if accept fails
        try:
            client = server.accept()
            lonely = False
            Conversation(client, secret, ended).start()
        except socket.timeout:
            if lonely and (ended.is_set() or time.monotonic() > start + LONELY):
                port = server.getsockname()[1]
                LOG.info("nobody has connected to port %s over TCP", port)
                lonely = False
            if ended.is_set():
                break
        except (OSError, RuntimeError) as error:  # no more files or threads
            LOG.error("cannot serve a client: %s", error)
            if client:
                client[0].close()
            time.sleep(1)
    for thread in threading.enumerate():
        if isinstance(thread, Conversation):
            thread.join(max(0, deadline - time.monotonic()))


# In the functions below, `pieces`, `answer` and `sums` are those of a Conversation.


def explain_early(count: int, early: bytes) -> str:
    """Return what is wrong with sending `early` when `count` bytes had been sent."""
    sent = f"the client sent {early[:32]!r} after only {count} of 9 bytes"
    return f"{sent}: send nothing until all 9 bytes are there, and then just 4"


def explain_leaving(read: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with leaving after reading at most `read`, "" if nothing."""
    if len(read) < 9:
        after = f"after right answer {len(sums)}, " if sums else ""
        left = f"left {after}before reading all 9 bytes of a frame"
        each = "until all are there, each time on the same connection"
        return f"{left}: receive {each}, until one begins with S"
    if read.startswith(b"S"):
        return ""
    did = f"got the whole question, sent {len(answer)} of the 4 bytes of an answer"
    first, second = struct.unpack("!xII", read)
    crash = f"it crashed on {first} + {second}"
    if max(sums, default=0) < 2**31 <= first + second:
        crash += " (the first sum too big for a signed integer)"
    others = "waited for more, or took the question for the secret"
    return f"{did}, and left: {crash}, {others}"


def explain_answer(pieces: List[bytes], answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with a wrong answer, which has at least 4 bytes."""
    question = b"".join(pieces)
    first, second = struct.unpack("!xII", question)
    size = len(answer)
    period = next(n for n in range(4, size + 1) if answer[:n] * (size // n) == answer)
    times = f"sent {size // period} times" if period < size else ""
    found: List[Set[str]] = [set() for _ in range(4)]  # by the number of mistakes
    if answer == bytes(min(first + second, LIMIT)):
        found[1].add("sent as bytes(sum), which is that many zero bytes")
    for total, adding in additions(pieces, sums):
        if (sending := form(total, question, answer[:period])) is not None:
            mistakes = [each for each in (adding, sending, times) if each]
            found[len(mistakes)].add(", ".join(mistakes))
    causes = sorted(found[1] or found[2])  # three at once are more likely chance
    why = ": " + "; or ".join(causes) if 0 < len(causes) < 4 else ""
    came = integer(answer) if size == 4 else f"{size} bytes"
    right = struct.pack("!I", first + second)
    equation = f"{first} + {second} is {first + second} ({right!r})"
    return f"{equation}, not {came} ({answer[:32]!r}){why}"


def additions(pieces: List[bytes], sums: List[int]) -> Iterator[Tuple[int, str]]:
    """Yield the sum of a question and "", then what mistakes make of it, by name."""
    question = b"".join(pieces)
    first, second = struct.unpack("!xII", question)
    yield first + second, ""
    yield first, "only the first operand"
    yield second, "only the second operand"
    yield sum(struct.unpack("<xII", question)), "the operands read as little-endian"
    yield sum(struct.unpack("!BII", question)), "the tag added to the operands"
    yield sum(struct.unpack("!xHH4x", question)), "the operands read as 16-bit integers"
    for some in (question, question[1:], question[1::4]):
        yield sum(some), "single bytes added"
    for bits in (16, 24, 31):
        yield (first + second) % 2**bits, f"wrapped modulo 2**{bits}"
    buffer = bytes(9)
    for piece in pieces:  # each put at the start, over the one before
        buffer = piece + buffer[len(piece) :]
    firsts = [start[1:] for start in itertools.accumulate(pieces[:-1])]
    short = "only the first or the last bytes used: receive until all 9 are there"
    for kept in filter(None, [*firsts, pieces[-1], pieces[-1][1:], buffer[1:]]):
        yield integer(kept[:4]) + integer(kept[4:8]), short
    parts = [(i, j) for i, j in itertools.combinations(range(10), 2) if j - i < 5]
    for (i, j), (k, n) in itertools.combinations_with_replacement(parts, 2):
        if j - i + n - k > 4:  # shorter ones give many small sums, by chance too
            added = f"added bytes [{i}:{j}] and [{k}:{n}] instead of [1:5] and [5:9]"
            why = "the slices are wrong, or a recv came short"
            yield integer(question[i:j]) + integer(question[k:n]), f"{added}: {why}"
    for number, earlier in enumerate(sums, 1):
        yield earlier, f"the sum of question {number}"
    yield sum(sums) + first + second, "all sums so far added up"


def form(total: int, question: bytes, data: bytes) -> Optional[str]:
    """Return the mistake in how `data` encodes a total, or ""; None if it does not."""
    n = len(data)
    right = struct.pack("!I", total % 2**32)
    text = data.strip(b"\0\t\r\n ").lower().decode("latin-1")
    # Text may be cut to 4 characters; so few would fit many wrong totals by chance.
    cut = 4 if n == 4 and total == sum(struct.unpack("!xII", question)) else None
    hexadecimal = [format(total, style)[:cut] for style in ("x", "08x", "#x", "#010x")]
    recoded = [right.decode(code, "replace").encode() for code in ("latin-1", "utf-8")]
    floats = [struct.pack(code, total) for code in ("!f", "<f", "!d", "<d")]
    table = (
        (data == right, ""),
        (text == str(total)[:cut], "sent as decimal text"),
        (text in hexadecimal, "sent as hexadecimal text"),
        (text == repr(right).lower(), "sent as the text of a bytes object"),
        (data in recoded, "sent as text, which changes bytes above 0x7F"),
        (data in floats, "sent as a float or a double"),
        (integer(data) == total % 256**n, f"sent in {n} bytes instead of 4"),
        (integer(data[::-1]) == total % 256**n, f"sent little-endian in {n} bytes"),
        (data == question[-max(8, n) :], "the operands sent, not their sum"),
        (data[:4] == right, f"sent with {data[4:][:32]!r} after it"),
        (data[-4:] == right, f"sent with {data[:-4][:32]!r} before it"),
    )
    return next((mistake for fits, mistake in table if fits), None)


def main() -> None:
    """Serve as the command line says, and exit with the command's status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="serve while it runs")
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:
        parser.error(f"argument --port: {args.port} is not from 0 to 65535")
    if args.command[:1] == ["--"]:
        del args.command[0]
    logging.basicConfig(level=logging.INFO, format="mathserver.py: %(message)s")
    family = socket.AF_INET6 if ":" in args.bind else socket.AF_INET
    address = (args.bind, args.port)
    try:
        server = socket.create_server(address, family=family, backlog=4096)
    except (OSError, TypeError) as error:  # args[-1] is the message
        sys.exit(f"mathserver.py: cannot listen on {args.bind}: {error.args[-1]}")
    LOG.info("listening on %s port %s", *server.getsockname()[:2])
    try:
        process: Any = subprocess.Popen(args.command) if args.command else None
    except OSError as error:
        LOG.error("cannot run %r: %s", args.command[0], error.strerror)
        os._exit(127)
    serve(server, secrets.token_urlsafe(6).encode(), process)
    code = process.returncode  # below 0 for a signal, and on Windows unsigned
    # A thread may be stuck in writing to the log, so exit without waiting for it.
    os._exit(128 - code if code < 0 else (code + 2**31) % 2**32 - 2**31)


if __name__ == "__main__":
    main()
