#!/usr/bin/env python3
"""Practice math server: ask addition questions over TCP, then send a secret phrase.

With a COMMAND, serve only while it runs, and exit with its status.
"""

import argparse
import contextlib
import logging
import random
import signal
import socket
import socketserver
import string
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Iterator, List, Optional, Set

PAUSE = 0.005  # seconds between the pieces of a frame
LOG = logging.getLogger("mathserver")


class Conversation(socketserver.StreamRequestHandler):
    """One client's questions and answers, and the secret phrase if all are right."""

    server: "MathServer"
    timeout = 60  # seconds that a client may be silent
    disable_nagle_algorithm = True  # else the kernel would join the pieces of a frame

    def handle(self) -> None:
        """Hold the conversation, and log in one line how it ended."""
        questions = self.server.questions
        if questions is None:
            questions = random.randint(5, 12)
        try:
            for number in range(1, questions + 1):
                stage = f"question {number}: "
                self.ask()
            stage = "secret: "
            self.send(b"S" + self.server.secret)
            stage, ending = "", f"right answers: {questions}, secret sent"
        except socket.timeout:
            ending = f"silent for {self.timeout} seconds"
        except OSError as error:
            ending = f"connection lost: {error.strerror}"
        except (EOFError, ValueError) as error:
            ending = str(error)
        LOG.info("%s: %s%s", endpoint(self.client_address), stage, ending)

    def ask(self) -> None:
        """Ask one question and take its answer, 4 bytes.

        Raise ValueError if it is wrong, EOFError if the stream ends before it does, and
        OSError if the connection fails.
        """
        first, second = random.randrange(2**31), random.randrange(2**31)
        right = struct.pack("!I", first + second)
        self.send(struct.pack("!cII", b"Q", first, second))
        answer = self.rfile.read(len(right))
        if not answer:
            raise EOFError("left without an answer")
        if len(answer) < len(right):
            raise EOFError(f"left after {len(answer)} of {len(right)} answer bytes")
        if answer != right:
            fault = f"{first} + {second} is {integer(right)}, not {integer(answer)}"
            raise ValueError(fault)

    def send(self, frame: bytes) -> None:
        """Send a frame, 9 bytes: whole if the server says so, else in 2 to 4 pieces."""
        cuts: List[int] = []
        if not self.server.whole_frames:
            cuts = sorted(random.sample(range(1, len(frame)), random.randint(1, 3)))
        for start, end in zip([0, *cuts], [*cuts, len(frame)]):
            if start:
                time.sleep(PAUSE)
            self.wfile.write(frame[start:end])


class MathServer(socketserver.ThreadingTCPServer):
    """A server that listens once it is made, on any free port if `port` is 0.

    Each conversation has `questions` questions, 5 to 12 if that is None, and ends with
    the 8-byte `secret`. Raise OSError or UnicodeError if it cannot listen on `host`.
    """

    allow_reuse_address = True
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
        self.questions = questions
        self.whole_frames = whole_frames
        self.connections: Set[Any] = set()
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, Conversation)

    def serve_forever(self, poll_interval: float = 0.05) -> None:
        LOG.info("listening on %s", endpoint(self.server_address))
        super().serve_forever(poll_interval)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve in a thread of its own while the block runs."""
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening, hang up on every client and wait for the conversations."""
        for connection in tuple(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


def integer(field: bytes) -> str:
    """Return a big-endian integer's value and its bytes, for a line of the log."""
    return f"{int.from_bytes(field, 'big')} ({field.hex(' ')})"


def endpoint(address: Any) -> str:
    """Return the host and port of an IPv4 or IPv6 socket address in words."""
    return f"{address[0]} port {address[1]}"


def port_number(text: str) -> int:
    """Return the TCP port that `text` spells, 0 to 65535."""
    if text not in map(str, range(65536)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 to 65535")
    return int(text)


def question_count(text: str) -> int:
    """Return the number that `text` spells, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def secret_phrase(text: str) -> bytes:
    """Return `text` in UTF-8, 8 bytes."""
    phrase = text.encode()
    if len(phrase) != 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not 8 bytes long in UTF-8")
    return phrase


def serve(server: MathServer, command: List[str]) -> int:
    """Serve while `command` runs, or for good if it is empty, or until a signal comes.

    Return the exit status as a shell tells it: the command's, or 128 + the signal's
    number. Raise OSError if the command cannot be started.
    """
    child = subprocess.Popen(command) if command else None
    awaited = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    with server.serving():
        while child is None or child.poll() is None:
            number = signal.sigwait(awaited)
            if number == signal.SIGCHLD:
                continue
            logging.disable()  # how a conversation ends now is not the client's doing
            if child:
                child.kill()
                child.wait()
            return 128 + number
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says, or exit with the usage and status 2."""
    parser = argparse.ArgumentParser(
        prog="mathserver.py",
        usage="%(prog)s [OPTION ...] [COMMAND ...]",
        description=__doc__,
    )
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=8000,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--questions",
        metavar="COUNT",
        type=question_count,
        help="questions in each conversation (default: 5 to 12 at random)",
    )
    parser.add_argument(
        "--secret",
        metavar="PHRASE",
        type=secret_phrase,
        default="".join(random.choices(string.ascii_letters + string.digits, k=8)),
        help="secret phrase, 8 bytes in UTF-8 (default: drawn at each start)",
    )
    parser.add_argument(
        "--whole-frames",
        action="store_true",
        help="send each frame in one piece (default: in pieces that arrive apart)",
    )
    parser.add_argument(
        "command",
        metavar="COMMAND ...",
        nargs=argparse.REMAINDER,
        help="serve only while this command runs, and exit with its status",
    )
    arguments = parser.parse_args()
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    return arguments


def main() -> int:
    """Serve as the command line says, and return the exit status."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="mathserver.py: %(message)s")
    try:
        server = MathServer(
            arguments.bind,
            arguments.port,
            arguments.secret,
            arguments.questions,
            arguments.whole_frames,
        )
    except (OSError, UnicodeError) as error:
        wanted = endpoint((arguments.bind, arguments.port))
        reason = getattr(error, "strerror", "not a valid host name")
        LOG.error("cannot listen on %s: %s", wanted, reason)
        return 1
    with server:
        try:
            return serve(server, arguments.command)
        except OSError as error:
            LOG.error("cannot run %r: %s", arguments.command[0], error.strerror)
            return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main())
