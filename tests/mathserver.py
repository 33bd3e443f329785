"""Ask addition questions over TCP, send a secret phrase, and log what goes wrong."""

import argparse
import contextlib
import functools
import logging
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Iterator, List, Optional, Tuple

PAUSE = 0.01  # seconds of silence before each piece of a frame, and after an answer
LATE = 1.3  # seconds before the last piece of question 1: sleep(1) must not be enough
SILENCE = 2.5  # seconds without a client, or without an answer, until the log says so
WATCH = 2  # seconds after the secret in which the client should send nothing more
TRACEBACK = 1  # seconds at most that the log waits for a failed client to print why
GRACE = 3  # seconds at most that clients may go on after the command has ended
LIMIT = 1024  # bytes of an answer that are looked at
OPERANDS, ANSWER = struct.Struct(">xII"), struct.Struct(">I")
WRONG_SLICES = ((0, 4, 4, 8), (1, 4, 5, 8), (1, 4, 4, 8), (1, 5, 6, 9), (2, 6, 6, 9))
TEXT = re.compile(rb"\d+|\0*[\s!-~]{5,}\0*")  # fewer letters may be chance
CLOSED = "closed the connection (or its sending side)"  # both look the same
integer = functools.partial(int.from_bytes, byteorder="big")


class Conversation(threading.Thread):
    """One client's questions and answers, and the secret phrase if all are right."""

    def __init__(self, number: int, client: Any, secret: str, ended: Any) -> None:
        self.sock, address = client
        super().__init__(name="%s port %s" % address[:2], daemon=True)
        self.number = number  # the first client is number 1
        self.secret = secret
        self.ended = ended  # an Event, set when the command that is served has ended
        self.stage = self.name  # what the log calls this point of the conversation
        self.sent = b""  # the part of the current frame that has been sent
        self.answer = b""  # what has come since that frame began
        self.sums: List[int] = []  # the right answers so far
        self.hinted = False  # true once the log has told of a silence
        self.wrong = ""  # what the client has done wrong

    def run(self) -> None:
        """Hold the conversation, and log what is wrong with the client, if anything."""
        try:
            with self.sock:
                # Otherwise the kernel may join the pieces of a frame.
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                for n in range(1, random.randint(5, 12) + 1):
                    self.stage = f"{self.name}: question {n}"
                    self.ask()
                self.stage = f"{self.name}: secret"
                logging.info("%s: %s for %s right answers", self.stage, self.secret, n)
                self.send(b"S" + self.secret.encode())
                self.sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(EOFError):  # as it should be
                    if more := self.receive(WATCH):
                        self.wrong = f"the client sent {show(more)}: S is no question"
        except ValueError as error:
            self.wrong = str(error)
        except (EOFError, OSError):
            self.wrong = explain_stop(self.sent, self.answer, self.sums)
        if self.wrong:
            self.ended.wait(TRACEBACK)
            # A mistake in an earlier connection may be the cause, so it is told first.
            deadline = time.monotonic() + TRACEBACK
            for other in threading.enumerate():
                if isinstance(other, Conversation) and other.number < self.number:
                    left = max(0, deadline - time.monotonic())
                    other.join(None if other.wrong else left)
            logging.info("%s: %s", self.stage, self.wrong)

    def ask(self) -> None:
        """Ask a question and take its answer; raise ValueError if that is wrong."""
        # The lab converts a sum into 4 bytes, so a question never needs to wrap.
        first, second = random.randrange(2**31), random.randrange(2**31)
        self.send(b"Q" + struct.pack(">II", first, second))
        while len(self.answer) < 4:
            piece = self.receive(None if self.hinted else SILENCE)
            if not piece:
                self.hinted = True
                did = f"has been silent for {SILENCE} s"
                hint = explain_stop(self.sent, self.answer, self.sums, did)
                logging.info("%s: %s", self.stage, hint)
            self.answer += piece
        with contextlib.suppress(EOFError, OSError):
            while len(self.answer) < LIMIT and (more := self.receive(PAUSE)):
                self.answer += more
        if self.answer != ANSWER.pack(first + second):
            raise ValueError(explain_answer(self.sent, self.answer, self.sums))
        self.sums.append(first + second)

    def send(self, frame: bytes) -> None:
        """Send a frame in 2 to 4 pieces; raise ValueError if anything comes before."""
        self.sent = self.answer = b""
        cuts, delay = sorted(random.sample(range(1, 9), random.randint(1, 3))), PAUSE
        if not self.sums:  # question 1, whose operands are always cut
            cuts, delay = [1, 3, 7], LATE
        for start, end in zip([0, *cuts], [*cuts, 9]):
            if early := self.receive(PAUSE if end < 9 else delay):
                raise ValueError(explain_early(start, early, self.sums))
            self.sock.sendall(frame[start:end])
            self.sent = frame[:end]

    def receive(self, seconds: Optional[float]) -> bytes:
        """Return what comes in time, or b""; raise EOFError at the end, or OSError."""
        self.sock.settimeout(seconds)
        try:
            data: bytes = self.sock.recv(LIMIT - len(self.answer))
        except socket.timeout:
            return b""
        if not data:
            raise EOFError
        return data


def serve(server: socket.socket, secret: str, process: Any) -> None:
    """Hold a conversation with each client until `process` ends; for ever if None."""
    ended = threading.Event()
    start = time.monotonic()
    deadline = float("inf")
    number = 0  # of clients so far
    lonely = True  # until a client has connected, or the log has said that none has
    server.settimeout(0.05 if process else None)  # how often to look at the process
    while time.monotonic() < deadline:
        if process and process.poll() is not None and not ended.is_set():
            ended.set()
            deadline = time.monotonic() + GRACE
        client: Any = None  # not the one before, if accept fails
        try:
            client = server.accept()
            lonely = False
            number += 1
            Conversation(number, client, secret, ended).start()
        except socket.timeout:
            if lonely and (ended.is_set() or time.monotonic() > start + SILENCE):
                port = server.getsockname()[1]
                logging.info("nobody has connected to port %s over TCP so far", port)
                lonely = False
            if ended.is_set():
                break
        except (OSError, RuntimeError) as error:  # no more files or threads
            logging.error("cannot serve a client: %s", error)
            if client:
                client[0].close()
            time.sleep(1)
    for thread in threading.enumerate():
        if isinstance(thread, Conversation):
            thread.join(max(0, deadline - time.monotonic()))


def explain_early(count: int, early: bytes, sums: List[int]) -> str:
    """Return what is wrong with sending `early` when `count` bytes had been sent."""
    line = f"the client sent {show(early)} after only {count} of 9 bytes"
    for n, total in enumerate(sums, 1):
        if early[:4] == ANSWER.pack(total):
            again = f"the answer to question {n} again"
            return f"{line}: {again}, perhaps because the question is still in a buffer"
    return f"{line}: call recv until all 9 are there, and then send just 4 bytes"


def explain_stop(sent: bytes, answer: bytes, sums: List[int], did: str = CLOSED) -> str:
    """Return what is known of a client that `did` this instead of going on."""
    if len(sent) < 9:
        line = f"the client {did} after {len(sent)} of 9 bytes had been sent to it: "
        if sums and not sent.startswith(b"S"):
            line += "use this same connection for all questions, and "
        return f"{line}call recv again until all 9 are there, however long it takes"
    if sent.startswith(b"S"):
        return "the client reset the connection: perhaps it left bytes unread"
    line = f"{show_question(sent)}, sent {len(answer)} of 4 bytes back and {did}"
    perhaps = "perhaps it crashed" if did == CLOSED else "perhaps it waits for more"
    return f"the client was sent {line}: {perhaps}, or did not send or flush its answer"


def explain_answer(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with a wrong answer, which has at least 4 bytes."""
    total = sum(OPERANDS.unpack(question))
    size = len(answer)
    causes = []
    for value, cause in likely_sums(question, sums):
        big = ANSWER.pack(value % 2**32)
        for four, order in ((big, ""), (big[::-1], ", sent little-endian")):
            if answer == four:
                causes.append(f"{cause}{order}")
            elif value == total and answer.count(four) > 1:
                causes.append(f"{cause}{order}, sent again and again")
            elif value == total and four in answer:
                causes.append(f"{cause}{order}, in {size} bytes instead of 4")
    if not causes and TEXT.fullmatch(answer):
        causes.append("sent as text, not as a 4-byte integer")
    unit = "bytes" if size < LIMIT else "or more bytes"
    came = integer(answer) if size == 4 else f"{size} {unit}"
    equation = f"{show_question(question)} is {total} ({ANSWER.pack(total).hex(' ')})"
    line = f"{equation}, not {came} ({show(answer)})"
    return f"{line}: {'; or '.join(causes)}" if causes else line


def likely_sums(question: bytes, sums: List[int]) -> Iterator[Tuple[int, str]]:
    """Yield the sums that clients send for a question, each with its name."""
    first, second = OPERANDS.unpack(question)
    yield first + second, "the right sum"
    yield first, "only the first operand"
    yield second, "only the second operand"
    yield sum(struct.unpack("<xII", question)), "the operands read as little-endian"
    yield sum(struct.unpack(">xHH4x", question)), "the operands read as 16-bit integers"
    for some in (question, question[1:], question[1::4]):
        yield sum(some), "single bytes added"
    for i, j, k, n in WRONG_SLICES:
        cause = f"bytes [{i}:{j}] + [{k}:{n}], not [1:5] + [5:9]"
        yield integer(question[i:j]) + integer(question[k:n]), cause
    for n in range(2, 9):
        head = question[:n]
        yield integer(head[1:5]) + integer(head[5:]), f"only the first {n} bytes"
    for n, earlier in enumerate(sums, 1):
        yield earlier, f"the sum of question {n}"
    if sums:
        yield sum(sums) + first + second, "all sums so far added up"


def show(data: bytes) -> str:
    """Return text in quotes, and all else in hexadecimal; "..." if there is more."""
    start = data[:32]
    text = len(data) != 4 and TEXT.fullmatch(data)  # 4 bytes are compared to an answer
    shown = repr(start.decode()) if text else start.hex(" ")
    return shown if start == data else f"{shown} ..."


def show_question(question: bytes) -> str:
    """Return the operands of a question, and its bytes."""
    first, second = OPERANDS.unpack(question)
    return f"{first} + {second} ({question.hex(' ')})"


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
    logging.info("listening on %s port %s", *server.getsockname()[:2])
    try:
        process: Any = subprocess.Popen(args.command) if args.command else None
    except OSError as error:
        logging.error("cannot run %r: %s", args.command[0], error.strerror)
        os._exit(127)
    serve(server, secrets.token_urlsafe(6), process)
    code = process.returncode  # below 0 for a signal, and on Windows unsigned
    # A thread may be stuck in writing to the log, so exit without waiting for it.
    os._exit(128 - code if code < 0 else (code + 2**31) % 2**32 - 2**31)


if __name__ == "__main__":
    main()
