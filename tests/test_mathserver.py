"""Tests of mathserver.py: what it asks, what its log says of a client, the command."""

import contextlib
import itertools
import logging.handlers
import queue
import resource
import signal
import socket
import struct
import sys
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from socket import TCP_NODELAY
from typing import Any, Dict, Iterator, List, Tuple
from unittest import mock

import mathserver
from test_lab4 import PYTHON, TIMEOUT, TracedSocket, each, finish, reset, run, started

import lab4

SERVER = (*PYTHON, mathserver.__file__)
PHRASE = b"open it!"
LITTLE = "little-endian"
WAIT = ("sh", "-c", "read line")  # a command
connect = socket.create_connection


def right(question: bytes) -> bytes:
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def wrong(question: bytes) -> Dict[str, bytes]:
    """Return what learners answer to a question instead, each with its name."""
    total, misread = (sum(struct.unpack(f"{order}xII", question)) for order in "><")
    return {
        "8 bytes": struct.pack(">Q", total),
        "text": str(total).encode(),
        "newline": right(question) + b"\n",
        "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "much": bytes(2000),
        LITTLE: struct.pack("<I", total),
        f"{LITTLE} operands": struct.pack(">I", misread % 2**32),
        f"{LITTLE} throughout": struct.pack("<I", misread % 2**32),
        **{f"bit {bit}": struct.pack(">I", total ^ 1 << bit) for bit in range(32)},
    }


def converse(address: Any) -> int:
    """Answer all questions; return how many there were."""
    with TracedSocket(connect(address)) as sock:
        assert lab4.answer_questions(sock) + sock.recv(1) == PHRASE
        return [call for call, _ in sock.calls].count("sendall")


def trust_one_recv(address: Any) -> bool:
    """Take what one recv returns for a frame; return whether that gets the phrase."""
    trust = mock.patch.object(lab4, "receive_frame", lambda sock: sock.recv(4096))
    failure = contextlib.suppress(OSError, ValueError, struct.error)
    with connect(address) as sock, trust, failure:
        return bool(lab4.answer_questions(sock) == PHRASE)
    return False


class TracingServer(mathserver.MathServer):
    def get_request(self) -> Tuple[socket.socket, Any]:
        accepted, address = super().get_request()
        self.accepted = TracedSocket(accepted)
        return self.accepted, address


class ConversationTest(unittest.TestCase):
    def setUp(self) -> None:
        self.lines: Any = queue.Queue()
        handler = logging.handlers.QueueHandler(self.lines)
        mathserver.LOG.addHandler(handler)
        self.addCleanup(mathserver.LOG.removeHandler, handler)
        mathserver.LOG.setLevel(logging.INFO)
        self.addCleanup(lambda: self.assertTrue(self.lines.empty()))

    @contextlib.contextmanager
    def serving(self, *parameters: Any) -> Iterator[Any]:
        self.server = TracingServer("127.0.0.1", 0, PHRASE, *parameters)
        with self.server, self.server.serving():
            yield self.server.server_address

    def assert_logged(self, *marks: str, times: int = 1) -> None:
        """Wait for so many lines of the log, each of which holds all the marks."""
        for _ in range(times):
            line = self.lines.get(timeout=TIMEOUT).getMessage() + "\n"
            for mark in ("127.0.0.1 port ", *marks):
                self.assertIn(mark, line)
            self.assertNotRegex(line, "(?i)broken pipe|reset")

    def test_right_answers_get_the_secret(self) -> None:
        for count, whole in ((0, False), (3, False), (20, True)):
            with self.subTest(count=count), self.serving(count, whole) as address:
                self.assertEqual(converse(address), count)
                self.assertFalse(self.lines.empty())  # said before the client can end
                self.assert_logged(repr(PHRASE), f" {count} ")

    def test_there_are_5_to_12_questions(self) -> None:
        with self.serving(None, True) as address:
            counts = [converse(address) for _ in range(150)]
            self.assertEqual(set(counts), set(range(5, 13)))
            self.assert_logged("secret: ", times=150)

    @mock.patch.object(mathserver, "PAUSE", 0.0001)
    def test_operands_and_pieces_are_random(self) -> None:
        operands: List[int] = []
        with self.serving(100) as address, connect(address) as sock:
            for _ in range(100):
                question = lab4.receive_frame(sock)
                operands += struct.unpack(">xII", question)
                accepted = self.server.accepted
                self.assertTrue(accepted.getsockopt(socket.IPPROTO_TCP, TCP_NODELAY))
                sock.sendall(right(question))
            self.assertEqual(lab4.answer_questions(sock), PHRASE)
            self.assert_logged()
        for drawn in (operands[::2], operands[1::2]):
            self.assertTrue(min(drawn) < 2**29 and 2**30 < max(drawn) < 2**31)
        pieces = [size for call, size in accepted.calls if call == "sendall"]
        ends = list(itertools.accumulate(pieces))
        self.assertEqual({end % 9 for end in ends}, set(range(9)))
        frames = Counter((end - 1) // 9 for end in ends)
        self.assertEqual(set(frames.values()), {2, 3, 4})

    def test_one_recv_is_not_one_frame_unless_frames_are_whole(self) -> None:
        for whole, least, most in ((False, 0, 3), (True, 30, 30)):
            with self.serving(None, whole) as address:
                got_through = sum(trust_one_recv(address) for _ in range(30))
                self.assertTrue(least <= got_through <= most, got_through)
                self.assert_logged(times=30)

    @mock.patch.object(mathserver, "PAUSE", TIMEOUT)
    def test_who_does_not_wait_for_a_frame_is_told_so(self) -> None:
        deeds = (lambda sock: sock.sendall(b"\0" * 4), repr(b"\0" * 4)), (reset, "left")
        for count, (deed, mark) in itertools.product((0, 1), deeds):
            with self.serving(count) as address, connect(address) as sock:
                piece = sock.recv(9)
                sock.setblocking(False)
                self.assertRaises(BlockingIOError, sock.recv, 9)
                deed(sock)
                name = "question 1: " if count else "secret: "
                self.assert_logged(name, mark, f" {len(piece)} of its 9 ", "; receive")

    def test_a_wrong_answer_is_explained(self) -> None:
        with self.serving(99, True) as address:
            for name in wrong(bytes(9)):
                with self.subTest(name), connect(address) as sock:
                    for number in range(1, 99):
                        frame = lab4.receive_frame(sock)
                        answer = wrong(frame)[name] if number > 1 else right(frame)
                        sock.sendall(answer)
                        if answer != right(frame):  # little-endian may be right by luck
                            break
                    self.assertEqual(sock.recv(1), b"")
                    first, second = struct.unpack(">xII", frame)
                    total = f"question {number}: {first} + {second} is {first + second}"
                    end = "" if "bit" in name else "\n"  # one bit may be little-endian
                    note = f", which is {LITTLE}\n" if LITTLE in name else end
                    fault = f", in 4 bytes {right(frame)!r}, not {answer!r}{note}"
                    self.assert_logged(total + fault)

    def test_who_leaves_inside_an_answer_has_left(self) -> None:
        with self.serving(1, True) as address:
            for size in range(5):
                with self.subTest(size), connect(address) as sock:
                    part = right(lab4.receive_frame(sock))[:size]
                    sock.sendall(part)
                    sock.shutdown(socket.SHUT_WR)
                    left = f"question 1: left after {size} of the 4 bytes"
                    self.assert_logged(*[left, repr(part)] if size < 4 else ["secret"])

    def test_who_leaves_before_the_server_ends_has_left(self) -> None:
        with self.serving() as address:
            for _ in range(100):
                connect(address).close()
        self.assert_logged("question 1: left ", times=100)

    def test_silence_is_told_before_the_client_is_dropped(self) -> None:
        self.assertEqual((mathserver.HINT, mathserver.LIMIT), (5, 600))
        for hint, limit in ((0.01, 0.01), (0, TIMEOUT)):
            patience = mock.patch.multiple(mathserver, HINT=hint, LIMIT=limit)
            with patience, self.serving(99, True) as address, connect(address) as sock:
                question = lab4.receive_frame(sock)
                self.assert_logged("question 1: still waiting after 0 of the 4 bytes")
                if limit == TIMEOUT:  # and told but once
                    for byte in right(question):
                        sock.sendall(bytes([byte]))
                    self.assertEqual(lab4.answer_questions(sock), PHRASE)
                self.assert_logged("question 1: silent for" if hint else "secret: ")

    @mock.patch.object(mathserver, "HINT", mathserver.LIMIT - 1)
    def test_stalled_clients_keep_nobody_waiting(self) -> None:
        room = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 28) // 4
        many = min(100, room)  # files are open at both ends of stalled and served
        with self.serving(1, True) as address:
            with contextlib.ExitStack() as stack, ThreadPoolExecutor(many) as pool:
                for _ in range(many):
                    stack.enter_context(connect(address))
                self.assertEqual({*pool.map(converse, [address] * 400)}, {1})
            self.assert_logged(times=400 + many)


class CommandTest(unittest.TestCase):
    @contextlib.contextmanager
    def starting(self, *arguments: Any, server: Any = SERVER) -> Iterator[Any]:
        """Start mathserver.py; yield the process and the address that it listens on."""
        with started(*server, "--port", "0", *arguments) as process:
            line = process.stderr.readline().decode()
            self.assertIn(": listening on 127.0.0.1 port ", line)
            yield process, ("127.0.0.1", int(line.split()[-1]))

    def outcome(self, number: int, *command: object) -> Any:
        """Run it with a command that may read the port, and send it a signal."""
        with self.starting(*command) as (process, address):
            process.send_signal(number)
            return finish(process, b"%d\n" % address[1])

    def test_it_ends_with_its_command_or_by_a_signal(self) -> None:
        lab = ("sh", "-c", 'read x; "$@" localhost $x', "sh", *PYTHON, lab4.__file__)
        crash = "import socket as s; s.create_connection(('localhost', int(input()))).x"
        cases: Dict[Tuple[Any, ...], Tuple[int, str]] = {
            (0, *lab): (0, r"([!-~]{8})\n.*: secret: b'\1'.*\n"),
            (0, "--", *lab): (0, r"([!-~]{8})\n.*: secret: b'\1'.*\n"),
            (0, "echo", "--port", "-h"): (0, "--port -h\n"),
            (0, "sh", "-c", "kill -TERM $$"): (143, ""),
            (0, "./nosuch"): (127, "mathserver.py: .*'./nosuch'.*\n"),
            (0, *PYTHON, "-c", crash): (1, r"(.*\n)*.*: question 1: left .*\n(.*\n)*"),
        }
        for number in (signal.SIGINT, signal.SIGTERM):
            cases.update({(number,): (-number, ""), (number, *WAIT): (-number, "")})
        outcomes = dict(each(self.outcome, cases))
        for case, (stdout, stderr, status) in outcomes.items():
            with self.subTest(case):
                self.assertEqual(status, cases[case][0])
                self.assertRegex(stdout.decode() + stderr, rf"\A{cases[case][1]}\Z")
        self.assertNotEqual(outcomes[(0, *lab)][0], outcomes[(0, "--", *lab)][0])

    def test_a_client_that_outlives_the_command_is_not_awaited(self) -> None:
        haste = "import mathserver as server; server.GRACE = 0; server.main()"
        hasty = (*PYTHON, "-c", f"import sys; sys.path = {sys.path}; {haste}")
        with self.starting(*WAIT, server=hasty) as (process, address), connect(address):
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_its_port_is_its_own_and_free_at_once_when_it_ends(self) -> None:
        with self.starting() as (_, address):
            with connect(address) as sock:
                sock.sendall(bytes(9))
                while sock.recv(9):
                    pass
            stdout, stderr, status = run(*SERVER, "--port", address[1])
            self.assertRegex(stderr, rf"\Amathserver.py: .* port {address[1]}: .*\n\Z")
            self.assertEqual((stdout, status), (b"", 1))
        with self.starting("--port", address[1]) as (_, again):
            self.assertEqual(again, address)

    def test_its_options_are_few_and_checked(self) -> None:
        cases = {"-h": 0, "--bind=203.0.113.1": 1, "--bind=a..b": 1}
        cases.update({"--port=-1": 2, "--port=65536": 2})
        cases.update({"--secret=12345678": 2, "--questions=1": 2, "--whole-frames": 2})
        lines = [(*SERVER, option) for option in cases]
        for (*_, option), (stdout, stderr, status) in each(run, lines):
            with self.subTest(option):
                self.assertEqual(status, cases[option])
                self.assertEqual(b"(default: 8000)" in stdout, option == "-h")
                self.assertEqual(stderr.count("mathserver.py: "), min(status, 1))
