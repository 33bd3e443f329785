"""Tests of lab4.py: the protocol on real sockets, and the command as a user runs it."""

import contextlib
import errno
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mathserver import MathServer

import lab4

PYTHON = (sys.executable, "-S", "-W", "error")  # no packages, and no warnings
COMMAND = (*PYTHON, lab4.__file__)
TIMEOUT = 30  # seconds, for things that take a fraction of one
PHRASE = b"\x00\xff\r\n\x1b[2J"  # unfit for decoders and terminals
SECRET = b"S" + PHRASE
QUESTION, ANSWER = b"Q\0\0\0\1\xff\0\0\1", b"\xff\0\0\2"
ENVIRONMENT = {  # in which it is known how a process writes and how long it looks up
    **os.environ,
    **{"COLUMNS": "200", "NO_COLOR": "1", "RES_OPTIONS": "attempts:1 timeout:1"},
    **{"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
}
socket.setdefaulttimeout(TIMEOUT)  # so that no test hangs


class TracedSocket(socket.socket):
    """A real socket that notes the calls on it; its recv takes nothing past a stop."""

    def __init__(self, sock: socket.socket, stops: Iterable[int] = ()) -> None:
        super().__init__(fileno=sock.detach())
        self.position, self.stops = 0, list(stops)  # in the stream that arrives
        self.calls: List[Tuple[str, int]] = []

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.calls.append(("recv", size))
        ahead = [stop - self.position for stop in self.stops if stop > self.position]
        data = super().recv(min([size, *ahead]), flags)
        self.position += len(data)
        return data

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self.calls.append(("sendall", len(data)))
        super().sendall(data, flags)


class ProtocolTest(unittest.TestCase):
    def exchange(self, stream: bytes, stops: Iterable[int] = ()) -> Any:
        """Let `stream` arrive; return the calls that took, the answers and the rest."""
        near, far = socket.socketpair()
        with near, TracedSocket(far, stops) as sock:
            near.sendall(stream)
            near.shutdown(socket.SHUT_WR)
            self.assertEqual(lab4.answer_questions(sock), PHRASE)
            calls, rest = sock.calls[:], sock.recv(4096)
            sock.shutdown(socket.SHUT_WR)
            with near.makefile("rb") as answers:
                return calls, answers.read(), rest

    def test_a_frame_may_arrive_in_any_pieces(self) -> None:
        for chosen in itertools.product((False, True), repeat=8):
            cuts = list(itertools.compress(range(1, 9), chosen))
            with self.subTest(cuts=cuts):
                stops = cuts + [9 + cut for cut in cuts]
                calls, *seen = self.exchange(QUESTION + SECRET + b"Q and more", stops)
                self.assertEqual(seen, [ANSWER, b"Q and more"])
                self.assertEqual(len(calls), len(stops) + 3)

    def test_a_whole_question_costs_one_recv_and_one_send(self) -> None:
        for n in (0, 1, 50):
            calls, *_ = self.exchange(QUESTION * n + SECRET)
            self.assertEqual(calls, [("recv", 9), ("sendall", 4)] * n + [("recv", 9)])

    def test_sums_are_big_endian_and_wrap_at_32_bits(self) -> None:
        edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 0x01020304)
        pairs = list(itertools.product(edges, repeat=2))
        questions = b"".join(struct.pack(">cII", b"Q", *pair) for pair in pairs)
        _, answers, _ = self.exchange(questions + SECRET)
        sums = [sum(pair) & 0xFFFFFFFF for pair in pairs]
        self.assertEqual(list(struct.unpack(f">{len(sums)}I", answers)), sums)

    def test_every_other_tag_is_refused(self) -> None:
        for tag in set(range(256)) - set(b"QS"):
            frame = bytes([tag]) + PHRASE
            with self.subTest(tag=tag), self.assertRaises(ValueError) as caught:
                self.exchange(frame)
            self.assertIn(repr(frame), str(caught.exception))

    def test_the_stream_may_end_before_the_secret_is_complete(self) -> None:
        for frame, size in itertools.product((QUESTION, SECRET), range(9)):
            with self.subTest(frame=frame, size=size):
                with self.assertRaises(EOFError) as caught:
                    self.exchange(QUESTION + frame[:size])
                self.assertRegex(str(caught.exception), rf"\b{size} of .*\b9\b")


@contextlib.contextmanager
def started(*line: object, **options: Any) -> Iterator[Any]:
    """Start a command line; kill what still runs at the end of the block."""
    pipes = {"stdin": -1, "stdout": -1, "stderr": -1, "bufsize": 0, "env": ENVIRONMENT}
    words = [str(word).encode() for word in line]  # UTF-8, as the environment says
    with subprocess.Popen(words, **{**pipes, **options}) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: Any, stdin: bytes = b"") -> Tuple[bytes, str, int]:
    """Wait for the end of a process; return its stdout, stderr and exit status."""
    stdout, stderr = process.communicate(stdin, TIMEOUT)
    return stdout or b"", stderr.decode(), process.returncode


def run(*line: object) -> Tuple[bytes, str, int]:
    with started(*line) as process:
        return finish(process)


def meet(sent: bytes, *acts: Any, line: Any = COMMAND, kill: int = 0, **io: Any) -> Any:
    """Run lab4.py against a server that sends and acts; return its address first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = (*line, *listener.getsockname())
        with started(*line, **io) as process, listener.accept()[0] as peer:
            peer.sendall(sent)
            for act in acts:
                act(peer)
            process.send_signal(kill)
            return listener.getsockname(), finish(process)


def each(function: Callable[..., Any], cases: Iterable[Any]) -> List[Tuple[Any, Any]]:
    """Return all cases with what `function` makes of them, some at a time."""
    cases = list(cases)
    with ThreadPoolExecutor(4) as pool:
        return list(zip(cases, pool.map(lambda case: function(*case), cases)))


def reset(sock: socket.socket) -> None:
    """Close the connection with a reset instead of an end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class CommandTest(unittest.TestCase):
    def assert_fault(self, reason: str, address: Any, seen: Any) -> None:
        stdout, stderr, status = seen
        self.assertEqual((stdout, status), (b"", 1))
        self.assertRegex(stderr, r"\Alab4\.py: .*\n\Z")
        self.assertTrue(stderr[:-1].isprintable(), stderr)
        for word in (repr(address[0])[1:-1], f" {address[1]}: ", f"{reason}\n"):
            self.assertIn(word, stderr)
        self.assertNotIn("Errno", stderr)

    def test_it_prints_the_phrase_byte_for_byte_in_any_locale(self) -> None:
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
        for environment in (ENVIRONMENT, {**ENVIRONMENT, **ascii_only}):
            _, seen = meet(QUESTION + SECRET, env=environment)
            self.assertEqual(seen, (PHRASE + b"\n", "", 0))

    def test_the_host_may_be_a_name_or_an_address(self) -> None:
        hosts = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
        for host, bind in hosts.items():
            with self.subTest(host):
                try:
                    server = MathServer(bind, 0, PHRASE, 1)
                except OSError as error:
                    self.skipTest(f"this machine has no {bind}: {error}")
                with self.assertLogs("mathserver"), server, server.serving():
                    seen = run(*COMMAND, host, server.server_address[1])
                self.assertEqual(seen, (PHRASE + b"\n", "", 0))

    @unittest.skipUnless(os.name == "posix", "this system has no executable scripts")
    def test_it_is_executable_and_has_help(self) -> None:
        stdout, stderr, status = run(lab4.__file__, "--help")
        self.assertEqual((stderr, status), ("", 0))
        for word in (b"usage: lab4.py [-h] host port", b"phrase", b"address", b"65535"):
            self.assertIn(word, stdout)

    def test_wrong_arguments_are_a_usage_error(self) -> None:
        ports = ("http", "", "-1", "0", "65536", "8000.0")
        named: Dict[Tuple[object, ...], str] = {("h", port): "port" for port in ports}
        named.update({(): "host", ("h",): "port", ("h", 1, "more"): "more"})
        for case, (stdout, stderr, status) in each(partial(run, *COMMAND), named):
            with self.subTest(case):
                self.assertEqual((stdout, status), (b"", 2))
                fault = rf"\Ausage: lab4\.py .*\nlab4\.py: error: .*\b{named[case]}\b"
                self.assertRegex(stderr, fault)

    def test_nobody_may_be_there(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            reasons = {
                taken.getsockname(): os.strerror(errno.ECONNREFUSED),
                **{("224.0.0.1", port): "" for port in (1, 65535)},  # for many, not one
                **{(host, 1): "" for host in ("", "ñandú.invalid", "a\x1bb")},
                **{(host, 1): "not a valid host name" for host in ("a..b", "a" * 64)},
            }
            for address, seen in each(partial(run, *COMMAND), reasons):
                with self.subTest(address):
                    self.assert_fault(reasons[address], address, seen)

    def test_the_server_may_end_it_in_any_way(self) -> None:
        lost, close = os.strerror(errno.ECONNRESET), socket.socket.close
        cases: Dict[Tuple[Any, ...], str] = {
            (b"", close): " 0 of a frame's 9 bytes",
            (QUESTION[:5], close): " 5 of a frame's 9 bytes",
            (QUESTION, lambda peer: peer.recv(4), close): " 0 of a frame's 9 bytes",
            (QUESTION, lambda peer: peer.recv(4, socket.MSG_PEEK), close): lost,
            (SECRET[:5], reset): lost,
            (b"", reset): lost,
            (b"q" + PHRASE,): repr(b"q" + PHRASE),
            (b"\x1b[2J\a\r\n\x9b and more",): repr(b"\x1b[2J\a\r\n\x9b "),
        }
        for case, seen in each(meet, cases):
            with self.subTest(case):
                self.assert_fault(cases[case], *seen)

    def test_ctrl_c_ends_a_wait_without_a_word(self) -> None:
        for stream in (b"", QUESTION[:5], SECRET[:8]):
            _, seen = meet(stream, kill=signal.SIGINT)
            self.assertEqual(seen, (b"", "", -signal.SIGINT))

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
    def test_stdout_may_be_a_full_device(self) -> None:
        with open("/dev/full", "wb") as full:
            self.assert_fault(os.strerror(errno.ENOSPC), *meet(SECRET, stdout=full))

    def test_stdout_may_be_a_pipe_without_a_reader(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            self.assert_fault(os.strerror(errno.EPIPE), *meet(SECRET, stdout=pipe))

    @unittest.skipUnless(os.name == "posix", "this system has no such shell")
    def test_stdout_may_be_closed(self) -> None:
        # The socket gets the number of stdout then, and must not get the phrase.
        seen = meet(SECRET, line=("sh", "-c", 'exec "$@" >&-', "sh", *COMMAND))
        self.assert_fault(os.strerror(errno.EBADF), *seen)
