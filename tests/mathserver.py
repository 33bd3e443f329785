"""Ask addition questions over TCP, send a secret phrase, and log what goes wrong."""

import argparse
import contextlib
import logging
import os
import random
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from subprocess import Popen
from typing import Any, Iterator, List, Optional, Tuple

PAUSE = 0.01  # seconds before a piece of a frame, and after an answer
LONGEST_PAUSE = 3  # seconds at most before the second piece, which a slow answer delays
SECRET_PAUSE = 0.2  # seconds at least before the second piece of the secret
SILENCE = 2.5  # seconds until the log says that no client, or no answer, has come
TRACEBACK = 0.3  # seconds in which a client prints its own error before the log speaks
GRACE = 3  # seconds at most that clients may go on after the command has ended
NUMBERS = struct.Struct(">xII")  # the two numbers of a question, after its tag
ANSWER = struct.Struct(">I")
# Bytes that clients add instead of [1:5] + [5:9].
WRONG_SLICES = ((0, 4, 4, 8), (1, 4, 5, 8), (1, 4, 4, 8), (1, 5, 6, 9), (2, 6, 6, 9))
TEXT = re.compile(rb"\d+|\0*[\s!-~]{5,}\0*")  # fewer letters may be chance


class Conversation(threading.Thread):
    """One client's questions and answers, and the secret phrase if all are right."""

    def __init__(self, client: Tuple[socket.socket, Any], secret: str) -> None:
        self.sock, address = client
        # macOS may know no address of a client that is already gone.
        name = "%s port %s" % address[:2] if address else "a client"
        super().__init__(name=name, daemon=True)
        self.secret = secret
        self.stage = name  # what the log calls this point of the conversation
        self.sent = b""  # the part of the current frame that has been sent
        self.answer = b""  # what has come since that frame began
        self.sums: List[int] = []  # the right answers so far
        self.pause = PAUSE  # seconds before the second piece of the next frame

    def run(self) -> None:
        """Hold the conversation, and log the client's mistake, if it makes one."""
        try:
            with self.sock:
                self.converse()
            return
        except ValueError as error:
            mistake = str(error)
        except (EOFError, OSError):
            did = "closed its side of the connection"
            mistake = explain_stop(did, self.sent, self.answer, self.sums)
        time.sleep(TRACEBACK)
        logging.info("%s: %s", self.stage, mistake)

    def converse(self) -> None:
        """Ask questions and send the secret; raise ValueError for a mistake."""
        # Otherwise the kernel may join the pieces of a frame.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        count = random.randint(5, 12)
        for number in range(1, count + 1):
            self.stage = f"{self.name}: question {number}"
            self.ask()
        self.stage = f"{self.name}: secret"
        right = f"{self.secret} for {count} right answers"
        logging.info("%s: %s; print just that", self.stage, right)
        self.pause = max(self.pause, SECRET_PAUSE)
        self.send(b"S" + self.secret.encode())
        with contextlib.suppress(EOFError, OSError):  # the client closes, as it should
            if late := self.receive(SILENCE):
                line = f"the client sent {show(late)} after the secret: end at a frame"
                raise ValueError(f"{line} that begins with S (frame[:1] == b'S')")

    def ask(self) -> None:
        """Ask a question and check its answer; raise ValueError if that is wrong."""
        # The lab converts a sum into 4 bytes, so a question never needs to wrap.
        first = random.randrange(2**31)
        second = random.randrange(2**31)
        self.send(b"Q" + struct.pack(">II", first, second))
        self.receive_answer()
        if self.answer != ANSWER.pack(first + second):
            raise ValueError(explain_answer(self.sent, self.answer, self.sums))
        self.sums.append(first + second)

    def receive_answer(self) -> None:
        """Receive 4 bytes, and what follows them; log once if the client is silent."""
        asked = time.monotonic()
        limit: Optional[float] = SILENCE
        while len(self.answer) < 4:
            piece = self.receive(limit)
            if not piece:
                limit = None
                did = f"has been silent for {SILENCE} s"
                line = explain_stop(did, self.sent, self.answer, self.sums)
                logging.info("%s: %s", self.stage, line)
            elif not self.answer:
                # A client that sleeps, instead of receiving until all is there, must
                # fail: the next frame takes longer than it slept before this answer.
                slept = time.monotonic() - asked
                self.pause = max(PAUSE, min(3 * slept, LONGEST_PAUSE))
            self.answer += piece
        with contextlib.suppress(
            EOFError, OSError
        ):  # they come again at the next frame
            self.answer += self.receive(PAUSE)

    def send(self, frame: bytes) -> None:
        """Send a frame in pieces; raise ValueError if anything comes before its end."""
        self.sent = self.answer = b""
        cuts = sorted(random.sample(range(1, 9), random.randint(3, 5)))
        if not self.sums:
            cuts = list(range(1, 9))  # question 1 goes byte by byte
        for start, end in zip([0, *cuts], [*cuts, 9]):
            if early := self.receive(self.pause if start == cuts[0] else PAUSE):
                raise ValueError(explain_early(start, early, self.sums))
            self.sock.sendall(frame[start:end])
            self.sent = frame[:end]

    def receive(self, seconds: Optional[float]) -> bytes:
        """Return what comes in time, perhaps b""; raise EOFError at the end."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(1024)
        except socket.timeout:
            return b""
        if not data:
            raise EOFError
        return data


def explain_early(count: int, early: bytes, sums: List[int]) -> str:
    """Return what is wrong with sending `early` after `count` bytes of a frame."""
    line = f"the client sent {show(early)} after only {count} of 9 bytes"
    for number, total in enumerate(sums, 1):
        if early[:4] == ANSWER.pack(total):
            again = f"the answer to question {number} again"
            return f"{line}: {again}, perhaps because the question is still in a buffer"
    return f"{line}: call recv until all 9 are there, and then send just 4 bytes"


def explain_stop(did: str, frame: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is known of a client that `did` this instead of going on.

    `frame` is what it was sent since its last answer: a whole frame, or its beginning.
    """
    if answer:
        return f"the client {did} after sending {show(answer)}: an answer has 4 bytes"
    if len(frame) == 9:
        return (
            f"the client {did} after {show_numbers(frame)}: if it printed an error, "
            "fix that; if not, perhaps it lost some of the 9 bytes or waits for more, "
            "does not tell Q from S, stopped before S came, or did not send or flush "
            "its answer"
        )
    advice = "call recv again until all 9 are there, however long it takes"
    if sums and not frame.startswith(b"S"):
        advice = f"answer until S comes, all on this connection, and {advice}"
    return (
        f"the client {did} after {len(frame)} of 9 bytes: {advice}; but if it printed "
        "an error that is not about missing bytes, fix that"
    )


def explain_answer(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with a wrong answer, which has at least 4 bytes."""
    total = sum(NUMBERS.unpack(question))
    right = f"{total} ({ANSWER.pack(total).hex(' ')})"
    came = ANSWER.unpack(answer)[0] if len(answer) == 4 else f"{len(answer)} bytes"
    line = f"{show_numbers(question)} is {right}, not {came} ({show(answer)})"
    cause = find_cause(question, answer, sums)
    return f"{cause}: {line}" if cause else line


def find_cause(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return the mistake that leads to such an answer, or "" if none is known."""
    for value, cause in likely_sums(question, sums):
        big = ANSWER.pack(value % 2**32)
        for four, order in ((big, ""), (big[::-1], ", but sent little-endian")):
            if answer == four:
                return f"{cause}{order}"
            if answer.count(four) > 1:
                return f"{cause}{order}, sent again and again"
            if four in answer:
                return f"{cause}{order}, in {len(answer)} bytes instead of 4"
    return "sent as text, not as a 4-byte integer" if TEXT.fullmatch(answer) else ""


def likely_sums(question: bytes, sums: List[int]) -> Iterator[Tuple[int, str]]:
    """Yield the sums that clients send for a question, each with what it is."""
    first, second = NUMBERS.unpack(question)
    yield first + second, "the right sum"
    yield first, "only the first number"
    yield second, "only the second number"
    yield sum(struct.unpack("<xII", question)), "the numbers read as little-endian"
    yield sum(question[1:]), "single bytes added"
    for i, j, k, n in WRONG_SLICES:
        added = int.from_bytes(question[i:j], "big")
        added += int.from_bytes(question[k:n], "big")
        yield added, f"bytes [{i}:{j}] + [{k}:{n}] (the numbers are [1:5] and [5:9])"
    for number, earlier in enumerate(sums, 1):
        yield earlier, f"the sum of question {number}"
    yield sum(sums) + first + second, "all sums so far added up"


def show(data: bytes) -> str:
    """Return text in quotes, and all else in hexadecimal; "..." if there is more."""
    start = data[:32]
    shown = repr(start.decode()) if TEXT.fullmatch(data) else start.hex(" ")
    return shown if start == data else f"{shown} ..."


def show_numbers(question: bytes) -> str:
    """Return the two numbers of a question, and its bytes."""
    first, second = NUMBERS.unpack(question)
    return f"{first} + {second} ({question.hex(' ')})"


def serve(server: socket.socket, process: "Optional[Popen[bytes]]") -> None:
    """Hold a conversation with each client until `process` ends; for ever if None."""
    secret = secrets.token_urlsafe(6)  # 8 characters
    server.settimeout(0.05 if process else None)  # how often to look at the process
    start = time.monotonic()
    lonely = True  # until a client has connected, or the log has said that none has
    ended = False
    while not ended:
        # Ask first: a client that connected before the end is accepted below.
        ended = process is not None and process.poll() is not None
        try:
            while True:
                Conversation(server.accept(), secret).start()
                lonely = False
        except socket.timeout:
            pass
        except (OSError, RuntimeError) as error:  # no more files or threads
            lonely = False
            logging.error("cannot serve a client: %s", error)
            time.sleep(0.5)
        if lonely and (ended or time.monotonic() > start + SILENCE):
            lonely = False
            nobody = f"nobody has connected to port {server.getsockname()[1]} over TCP"
            logging.info("%s so far: check host and port in the client", nobody)
    deadline = time.monotonic() + GRACE
    for thread in threading.enumerate():
        if isinstance(thread, Conversation):
            thread.join(max(0, deadline - time.monotonic()))


def main() -> None:
    """Serve clients while the command runs, and exit with its status, or for ever."""
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
    try:
        server = socket.create_server((args.bind, args.port), family=family)
    except (OSError, TypeError) as error:  # args[-1] is the message
        sys.exit(f"mathserver.py: cannot listen on {args.bind}: {error.args[-1]}")
    logging.info("listening on %s port %s", *server.getsockname()[:2])
    try:
        process = Popen(args.command) if args.command else None
    except OSError as error:
        advice = ""
        if args.command[0].endswith(".py") and os.path.exists(args.command[0]):
            advice = ": write python3 before it"
        logging.error("cannot run %r: %s%s", args.command[0], error.strerror, advice)
        sys.exit(127)
    serve(server, process)
    assert process  # without one, serve does not return
    status = process.returncode
    if status < 0:  # a signal ended it: exit as a shell does
        status = 128 - status
    # A thread may be stuck in writing to the log, so exit without waiting for it.
    os._exit(min(status, 255))  # a crash on Windows has a bigger one


if __name__ == "__main__":
    main()
