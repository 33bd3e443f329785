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
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO, Iterator, List, Optional, Tuple

PAUSE = 0.01  # seconds before a piece of a frame, and after an answer
LONGEST_PAUSE = 3  # seconds at most before the second piece, after a slow answer
SECRET_PAUSE = 0.2  # seconds at least before the second piece of the secret
SILENCE = 2.5  # seconds until the log says that a client does nothing
TRACEBACK = 0.3  # seconds the log waits, so that a client's own error comes first
GRACE = 3  # seconds at most that clients may go on after the command has ended
NUMBERS = struct.Struct(">xII")  # the two numbers of a question, after its tag
ANSWER = struct.Struct(">I")
# Some clients are wrong only if a frame has certain bytes. These questions have them.
SPECIAL_QUESTIONS = {
    2: b"QQS\r\nS\0 \n",  # both tags, line ends, and all of it text
    3: b"Q\x00\x00\x00\x03\x00\x00\x01\x00",  # a zero byte at the end, a small sum
    4: b"Q\xff\xff\xff\xfe\x00\x00\x00\x01",  # the largest sum
    5: b"QSecrSecr",  # letters alone, equal numbers
    6: b"Q\x00\x00\x00\x00\x00\x00\x00\x0a",  # zero, a line end in the sum
}
PHRASE = "SQ" + secrets.token_hex(3)  # 8 letters and digits, the tags among them
# Bytes that clients add instead of [1:5] + [5:9].
WRONG_SLICES = (((0, 4), (4, 8)), ((0, 4), (5, 9)), ((1, 4), (5, 8)))


class ClientError(Exception):
    """What a client did wrong."""


class Conversation(threading.Thread):
    """One client's questions and answers, and the secret phrase if all are right."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        super().__init__(name=name, daemon=True)
        self.sock = sock
        self.sent = b""  # the part of the current frame that has been sent
        self.sums: List[int] = []  # the right answers so far
        self.pause = PAUSE  # seconds before the second piece of the next frame
        self.has_secret = False
        self.has_mistake = False

    def run(self) -> None:
        """Hold the conversation, and log the client's mistake, if it makes one."""
        try:
            with self.sock:
                self.converse()
        except ClientError as error:
            self.log_mistake(str(error))
        except (EOFError, OSError):
            self.log_mistake(explain_end(self.sent))

    def log_mistake(self, mistake: str) -> None:
        """Log a mistake, but let the client print its own error first."""
        self.has_mistake = True
        time.sleep(TRACEBACK)
        stage = "secret" if self.has_secret else f"question {len(self.sums) + 1}"
        logging.info("%s: %s: %s", self.name, stage, mistake)

    def converse(self) -> None:
        """Ask questions and send the secret; raise ClientError, EOFError or OSError."""
        # Otherwise the kernel may join the pieces of a frame.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        count = random.randint(7, 12)
        for number in range(1, count + 1):
            self.ask(SPECIAL_QUESTIONS.get(number) or make_question())
        right = f"{PHRASE} for {count} right answers"
        logging.info("%s: secret: %s; print just that", self.name, right)
        self.has_secret = True
        self.pause = max(self.pause, SECRET_PAUSE)
        self.send(b"S" + PHRASE.encode())
        late = self.receive_within(SILENCE)
        if late is None:
            raise ClientError(f"the client has not closed {SILENCE} s after the secret")
        if late:
            line = f"the client sent {show(late)} after the secret"
            raise ClientError(f"{line}: end at a frame with frame[:1] == b'S'")

    def ask(self, question: bytes) -> None:
        """Ask a question and check its answer; raise what converse raises."""
        self.send(question)
        answer = self.receive_answer()
        total = sum(NUMBERS.unpack(question))
        if answer != ANSWER.pack(total):
            raise ClientError(explain_answer(question, answer, self.sums))
        self.sums.append(total)

    def receive_answer(self) -> bytes:
        """Return 4 bytes, more if others follow, or fewer if the rest does not come."""
        asked = time.monotonic()
        answer = self.receive_within(SILENCE)
        if answer is None:
            self.log_mistake(explain_silence(self.sent))
            answer = self.receive_within(None)
        if not answer:
            raise EOFError
        # A client that sleeps, instead of receiving until all is there, should fail:
        # the next frame takes longer than it slept before this answer.
        slept = time.monotonic() - asked
        self.pause = max(PAUSE, min(3 * slept, LONGEST_PAUSE))
        while len(answer) < 4 and (more := self.receive_within(SILENCE)):
            answer += more
        return answer + (self.receive_within(PAUSE) or b"")

    def send(self, frame: bytes) -> None:
        """Send a frame in pieces; nothing may come before the last one is sent."""
        self.sent = b""
        if self.sums:
            cuts = sorted(random.sample(range(1, 9), random.randint(3, 5)))
        else:
            cuts = list(range(1, 9))  # question 1 goes byte by byte
        for start, end in zip([0, *cuts], [*cuts, 9]):
            # The piece at cuts[0] is the second one.
            early = self.receive_within(self.pause if start == cuts[0] else PAUSE)
            if early:
                raise ClientError(explain_early(start, early, self.sums))
            if early is not None:
                raise EOFError
            self.sock.sendall(frame[start:end])
            self.sent = frame[:end]

    def receive_within(self, seconds: Optional[float]) -> Optional[bytes]:
        """Return what comes in time, b"" at the end, or None if nothing comes."""
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(1024)
        except socket.timeout:
            return None
        except ConnectionError:  # a reset is an end, too
            return b""


def make_question() -> bytes:
    """Return a question with random numbers, whose sum fits into 4 bytes."""
    first = random.randrange(2**32)
    second = random.randrange(2**32 - first)
    return b"Q" + struct.pack(">II", first, second)


def explain_early(count: int, early: bytes, sums: List[int]) -> str:
    """Return what is wrong with sending `early` after `count` bytes of a frame."""
    line = f"the client sent {show(early)} after only {count} of 9 bytes"
    for number, total in enumerate(sums, 1):
        if early[:4] == ANSWER.pack(total):
            return f"{line}: the answer to question {number}, perhaps still in a buffer"
    if count == 0 or len(early) < 4:
        return f"{line}: send just 4 bytes, and only as an answer"
    return f"{line}: call recv until all 9 are there, and then send just 4 bytes"


def explain_silence(question: bytes) -> str:
    """Return what is known of a client that has a question and does nothing."""
    return (
        f"the client has been silent for {SILENCE} s after all 9 bytes of "
        f"{show_numbers(question)}: perhaps it waits for more, lost some of them, does "
        "not know Q, hides an error, or has not sent or flushed its answer"
    )


def explain_end(frame: bytes) -> str:
    """Return what is known of a client that closed after `frame`, whole or in part."""
    line = "the client closed its side of the connection after"
    if len(frame) == 9:
        return (
            f"{line} all 9 bytes of {show_numbers(frame)}: if it printed an error, fix "
            "that; if none, or one about decoding, perhaps it took the question for "
            "the secret: go on until frame[:1] == b'S'"
        )
    advice = "go on until S comes, all on this connection"
    if frame:
        advice = "call recv until all 9 are there, for each frame until S comes"
    return (
        f"{line} {len(frame)} of 9 bytes: {advice}; but if it printed an error that is "
        "not about missing bytes, fix that"
    )


def explain_answer(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return what is wrong with a wrong answer of 1 byte or more."""
    total = sum(NUMBERS.unpack(question))
    right = f"{total} ({show(ANSWER.pack(total))})"
    came = show(answer)
    if len(answer) == 4:
        came = f"{ANSWER.unpack(answer)[0]} ({came})"
    cause = find_cause(question, answer, sums)
    return f"{cause}: {show_numbers(question)} is {right}, not {came}"


def find_cause(question: bytes, answer: bytes, sums: List[int]) -> str:
    """Return the mistake that leads to such an answer, as far as it is known."""
    if len(answer) < 4:
        return "too few bytes"
    if len(answer) > 4 and not any(answer):
        return "only zeros, as bytes(n) makes them"
    if answer in (question, question[1:]):
        return "the numbers themselves, not their sum"
    size = f", in {len(answer)} bytes instead of 4" if len(answer) > 4 else ""
    for value, cause in likely_sums(question, sums):
        big = ANSWER.pack(value % 2**32)
        for four, order in ((big, ""), (big[::-1], ", sent as little-endian")):
            if four not in (answer[:4], answer[-4:]):
                continue
            if answer.count(four) > 1:
                size = ", more than once: send it once, and empty the buffer after it"
            return f"{cause}{order}{size}"
    if re.fullmatch(rb"\d{4,}|[\s!-~]{5,}", answer):  # shorter text may be chance
        return "sent as text, not as a 4-byte integer"
    return "a wrong answer, in too many bytes" if len(answer) > 4 else "a wrong answer"


def likely_sums(question: bytes, sums: List[int]) -> Iterator[Tuple[int, str]]:
    """Yield the sums that clients send for a question, each with what it is."""
    first, second = NUMBERS.unpack(question)
    yield first + second, "the right sum"
    yield first, "only the first number"
    yield second, "only the second number"
    yield sum(struct.unpack("<xII", question)), "the numbers read as little-endian"
    yield sum(question[1:]), "single bytes added"
    for (i, j), (k, n) in WRONG_SLICES:
        added = int.from_bytes(question[i:j], "big")
        added += int.from_bytes(question[k:n], "big")
        yield added, f"bytes [{i}:{j}] + [{k}:{n}] (the numbers are [1:5] and [5:9])"
    for number, earlier in enumerate(sums, 1):
        yield earlier, f"the sum of question {number}, perhaps still in a buffer"
    yield sum(sums) + first + second, "all sums so far added up"


def explain_output(printed: bytes, count: int) -> str:
    """Return what is wrong with the stdout of `count` clients that got the secret."""
    if not count or printed.splitlines() == [PHRASE.encode()] * count:
        return ""
    start = printed[:60].decode(errors="backslashreplace")
    more = " ..." if len(printed) > 60 else ""
    return f"the client printed {start!r}{more}, not just the phrase"


def show(data: bytes) -> str:
    """Return bytes in hexadecimal, and "..." if there are more than 32."""
    more = " ..." if len(data) > 32 else ""
    return data[:32].hex(" ") + more


def show_numbers(question: bytes) -> str:
    """Return the two numbers of a question, and its bytes."""
    first, second = NUMBERS.unpack(question)
    return f"{first} + {second} ({show(question)})"


def serve(server: socket.socket, conversations: List[Conversation]) -> None:
    """Hold a conversation with each client that connects, for ever."""
    while True:
        sock = server.accept()[0]
        conversation = Conversation(f"client {len(conversations) + 1}", sock)
        conversation.start()
        conversations.append(conversation)  # a thread can be joined once it is started


def run(process: "Popen[bytes]", server: socket.socket) -> int:
    """Serve clients while a command runs; return the status to exit with."""
    conversations: List[Conversation] = []
    printed = bytearray()
    threading.Thread(target=serve, args=(server, conversations), daemon=True).start()
    copying = threading.Thread(target=copy, args=(process.stdout, printed), daemon=True)
    copying.start()
    with contextlib.suppress(TimeoutExpired):
        process.wait(SILENCE)
    if not conversations:
        time.sleep(TRACEBACK)  # perhaps a client has ended before it was accepted
    if not conversations:
        logging.info("nobody has connected: check host, port and TCP (SOCK_STREAM)")
    process.wait()
    deadline = time.monotonic() + GRACE
    for thread in (copying, *conversations):
        thread.join(max(0, deadline - time.monotonic()))
    return judge(process.returncode, conversations, bytes(printed))


def judge(status: int, conversations: List[Conversation], printed: bytes) -> int:
    """Log a wrong output; return the command's status, or 1 if not all went well."""
    count = sum(each.has_secret for each in conversations)
    wrong_output = explain_output(printed, count)
    if wrong_output:
        logging.info(wrong_output)
    if status < 0:  # a signal ended the command: exit as a shell does
        return 128 - status
    right = [each.has_secret and not each.has_mistake for each in conversations]
    failed = wrong_output or not right or not all(right)
    return status or int(bool(failed))


def copy(source: IO[bytes], printed: bytearray) -> None:
    """Copy what the command prints to stdout as it comes, and keep it in `printed`."""
    with source, contextlib.suppress(OSError):  # nobody may read stdout any more
        while data := source.read(1024):
            printed += data
            os.write(1, data)


def main() -> None:
    """Serve for ever, or while the command runs, and then exit with its status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="serve while it runs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="mathserver.py: %(message)s")
    try:
        server = socket.create_server((args.bind, args.port))
    except (OSError, OverflowError) as error:
        sys.exit(f"mathserver.py: cannot listen: {error}")
    logging.info("listening on %s port %s", *server.getsockname())
    if not args.command:
        serve(server, [])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # Python prints at once
    try:
        process = Popen(args.command, stdout=PIPE, bufsize=0, env=environment)
    except OSError as error:
        is_python = args.command[0].endswith(".py")
        reason = "write python3 before it" if is_python else error.strerror
        sys.exit(f"mathserver.py: cannot run {args.command[0]!r}: {reason}")
    # Ctrl-C is now the command's. What it cuts short is not logged as a mistake.
    signal.signal(signal.SIGINT, lambda *_: logging.disable())
    sys.exit(run(process, server))


if __name__ == "__main__":
    main()
