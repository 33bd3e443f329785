"""Tests of mathserver.py: what it asks, what its log says of a client, the command."""

import contextlib
import itertools
import logging.handlers
import os
import queue
import signal
import socket
import struct
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import mathserver, support
from tests.support import POSIX, PYTHON, finish, run, started

PHRASE = b"open it!"
QUESTION, RIGHT = b"Q\x01\x02\x03\x04\x10\x20\x30\x40", b"\x11\x22\x33\x44"
CARRY = b"Q\x02\xff\x42\xfe\x7f\x04\x03\x85"  # the sum is 0x82034683
SUMS = [0x01010101, 0x02020202]  # those of the questions before
CAUSES = (  # a question, a wrong answer and what is said to be the cause
    (QUESTION, b"\x55\x11\x22\x33", "bytes [0:4] and [4:8] sliced or received, not"),
    (QUESTION, b"\0\x11\x22\x33", "bytes [1:4] and [5:8] sliced or received, not"),
    (QUESTION, b"\0\0\0\xaa", "single bytes added"),
    (QUESTION, b"\0\0\0\x11", "single bytes added"),
    (QUESTION, b"\0\0\x44\x66", "pairs of bytes added"),
    (QUESTION, b"\x10\x20\x30\x40", "only the second operand"),
    (QUESTION, b"\x01\x02\x03\x04", "until all 9 are there; or only the first operand"),
    (QUESTION, b"\0\0\x33\x44", "not [1:5] and [5:9]; or wrapped modulo 2**16"),
    (CARRY, b"\x02\x03\x46\x83", "wrapped modulo 2**31"),
    (QUESTION, b"\x02\x02\x02\x02", "the sum of question 2"),
    (QUESTION, b"\x14\x25\x36\x47", "all sums so far added up"),
    (QUESTION, b"287454020\r\n", "sent as decimal text"),
    (QUESTION, b"0x11223344", "sent as hexadecimal text"),
    (QUESTION, repr(RIGHT).encode(), "sent as the text of a bytes object"),
    (QUESTION, bytes(4) + RIGHT, "sent big-endian in 8 bytes"),
    (QUESTION, b"Q" + RIGHT, "sent with b'Q' before it"),
    (QUESTION, QUESTION + RIGHT, "sent with the question before it"),
    (QUESTION, QUESTION[1:], "the operands sent one after the other"),
    (QUESTION, RIGHT + b"\n", r"sent with b'\n' after it"),
    (QUESTION, RIGHT * 6, "sent 6 times"),
    (QUESTION, RIGHT[::-1], "in 4 bytes; or the operands read as little-endian"),
    (CARRY, b"\x83\x46\x03\x82", "sent little-endian in 4 bytes"),
    (CARRY, b"\x83\x46\x03\x81", "the operands read as little-endian"),
    (CARRY, b"\x81\x03\x46\x83", "read as little-endian, sent little-endian in 4"),
)
LEAVINGS: Any = (  # what was sent, came and was right; bytes left unread; what is said
    (b"", b"", SUMS, False, "left after right answer 2; go on until"),
    (CARRY[:8], b"", SUMS, False, "left before reading all 9 bytes; receive until"),
    (b"S12345678", b"", SUMS, True, "left before reading all 9 bytes; receive until"),
    (CARRY, b"", [], False, "0 of 4 sent: it failed at 50283262 + 2130969477, waited"),
    (CARRY, b"ab", [2**31], False, "2 of 4 sent: it failed at 50283262 + 2130969477"),
    (CARRY, b"", SUMS, False, "a signed integer, 50283262 + 2130969477"),
    (QUESTION, b"", SUMS, False, "it failed at 16909060 + 270544960, waited for"),
)


class ExplanationTest(unittest.TestCase):
    def test_a_wrong_answer_has_a_cause(self):
        for question, answer, cause in CAUSES:
            line = mathserver.explain_answer(question, answer, SUMS)
            self.assertIn(cause, line.partition("): ")[2], answer)

    def test_no_cause_is_better_than_a_wrong_one(self):
        equation = r"""16909060 + 270544960 is 287454020 (b'\x11"3D'), not """
        value, length = "35 (b'\\x00\\x00\\x00#')", f"33 bytes ({bytes(32)!r})"
        for answer, came in ((b"\0\0\0#", value), (bytes(33), length)):
            line = mathserver.explain_answer(QUESTION, answer, SUMS)
            self.assertEqual(line, equation + came)

    def test_leaving_is_explained(self):
        for *state, words in LEAVINGS:
            self.assertIn(words, mathserver.explain_leaving(*state), state)
        self.assertEqual(mathserver.explain_leaving(b"S12345678", b"", [], False), "")


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock):
    """Return the next 9 bytes, fewer if the stream ends before."""
    with sock.makefile("rb") as stream:
        return stream.read(9)


def converse(sock):
    """Answer each question; return the frames that came, the secret at last."""
    frames = [receive(sock)]
    while frames[-1][:1] == b"Q":
        sock.sendall(right(frames[-1]))
        frames.append(receive(sock))
    return frames


@mock.patch.object(mathserver, "PAUSE", 0.001)
class ConversationTest(unittest.TestCase):
    def setUp(self):
        self.lines: Any = queue.Queue()
        handler = logging.handlers.QueueHandler(self.lines)
        mathserver.LOG.addHandler(handler)
        mathserver.LOG.setLevel(logging.INFO)
        self.addCleanup(mathserver.LOG.removeHandler, handler)

    @contextlib.contextmanager
    def talking(self, stops=()):
        """Connect a client; yield its socket and, in a conversation, the server's."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname())
            accepted, address = server.accept()
        served = support.TracedSocket(accepted, stops)
        talk = mathserver.Conversation((served, address), PHRASE, mock.Mock())
        talk.start()
        with sock:
            yield sock, served
        talk.join(support.TIMEOUT)

    def assert_line(self, *words):
        """Check that the next line of the log has all the words."""
        line = self.lines.get(timeout=support.TIMEOUT).getMessage()
        for word in words:
            self.assertIn(word, line)

    @mock.patch.object(mathserver, "HINT", support.TIMEOUT)
    def test_right_answers_get_the_secret(self):
        for pick, questions, pieces in ((min, 5, 2), (max, 12, 4)):
            picking = mock.patch("random.randint", lambda *ends, pick=pick: pick(ends))
            with picking, self.talking() as (sock, served):
                frames = converse(sock)
                self.assertEqual(self.lines.qsize(), 1, "lines before the secret")
                self.assert_line(f"secret: {PHRASE!r} for {questions} right answers")
                self.assertEqual(sock.recv(1), b"")
            self.assertEqual(frames[questions:], [b"S" + PHRASE])
            self.assertEqual(len(served.pieces), pieces * (questions + 1))

    def test_operands_and_cuts_are_random(self):
        questions, cuts = [], {0}
        for _ in range(8):
            with self.talking() as (sock, served):
                questions += converse(sock)[:-1]
            sizes = [size for size, _ in served.pieces]
            cuts.update(end % 9 for end in itertools.accumulate(sizes))
        self.assertEqual(cuts, set(range(9)))
        for drawn in zip(*(struct.unpack(">xII", question) for question in questions)):
            self.assertTrue(min(drawn) < 2**30 < max(drawn) < 2**31, drawn)

    def test_a_piece_is_sent_after_a_pause_without_delay_or_time_limit(self):
        with self.talking() as (sock, served):
            receive(sock)
            self.assertTrue(served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertEqual({limit for _, limit in served.pieces}, {None})
        self.assertEqual(served.calls[:4], ["recv", "sendall"] * 2)

    def test_a_wrong_answer_is_explained_by_what_went_before(self):
        with self.talking() as (sock, _):
            answer = right(receive(sock))
            for _ in range(2):
                sock.sendall(answer)
                last = receive(sock)
            self.assertEqual(last, b"")
        self.assert_line("question 2: ", "the sum of question 1")

    def test_what_follows_an_answer_belongs_to_it(self):
        with self.talking(stops=[4]) as (sock, _):
            sock.sendall(right(receive(sock)) + b"\n")
            self.assertEqual(sock.recv(9), b"")
        self.assert_line("question 1: ", r"'\n' after it")

    def test_who_speaks_too_early_is_told_so(self):
        mathserver.PAUSE = support.TIMEOUT  # in which the client speaks
        for data, words in (
            (b"1234", ("too early: b'1234' came when 0 of 9 ", "receive until all")),
            (b"hello\n", (r"unasked: b'hello\n' came when 0 of 9 ", "speaks first")),
        ):
            with self.talking() as (sock, _):
                sock.sendall(data)
                self.assertEqual(sock.recv(9), b"")
            self.assert_line(*words)

    @mock.patch.object(mathserver, "HINT", 0.001)
    def test_silence_is_told_once(self):
        with self.talking() as (sock, _):
            question = receive(sock)
            self.assert_line("question 1: silent", "all 9 bytes", "; 0 of its 4 have")
            self.assertRaises(queue.Empty, self.lines.get, timeout=0.05)
            sock.sendall(right(question))
            converse(sock)
            self.assert_line("secret: ")

    def test_a_client_that_leaves_instead_of_answering_is_told_so(self):
        for size in range(4):
            with self.talking() as (sock, _):
                sock.sendall(right(receive(sock))[:size])
            self.assert_line("question 1: ", f"all 9 bytes and left with {size} of 4")

    def test_a_client_that_leaves_after_an_answer_is_told_so(self):
        with self.talking() as (sock, _):
            question = receive(sock)
            mathserver.PAUSE = support.TIMEOUT  # in which the stream ends
            sock.sendall(right(question))
        self.assert_line("question 2: left after right answer 1")

    @unittest.skipUnless(sys.platform == "linux", "a reset tells of it on Linux alone")
    def test_a_client_that_leaves_bytes_unread_is_told_so(self):
        for size in (1, 9):
            with self.talking() as (sock, _):
                while len(sock.recv(size, socket.MSG_PEEK)) < size:
                    pass
            self.assert_line("question 1: left before reading all")

    @unittest.skipUnless(sys.platform == "linux", "a reset tells of it on Linux alone")
    def test_a_client_that_leaves_before_the_last_piece_has_not_read_all(self):
        def sendall(data):
            if sum(size for size, _ in served.pieces) + len(data) == 9:
                sock.recv(9)
                sock.close()
            send(data)

        mathserver.PAUSE = 0.1  # before it sends
        with self.talking() as (sock, served):
            send, served.sendall = served.sendall, sendall
            self.assert_line("question 1: left before reading all")

    def test_what_comes_after_the_secret_is_no_answer(self):
        with self.talking() as (sock, _):
            converse(sock)
            sock.sendall(b"sum!")
        self.assert_line("secret: ", repr(PHRASE))
        self.assert_line("secret: b'sum!' came after it")


SERVER = (*PYTHON, "-W", "error", mathserver.__file__)
COMMAND = (*PYTHON[:2], "-c")  # the command to serve, in Python
WAIT = "import sys; sys.stdin.readline()"
LAB = "import subprocess, sys; sys.exit(subprocess.call([*sys.argv[1:], input()]))"
CONNECT = "import socket; s = socket.create_connection(('127.0.0.1', int(input())))"
CROWD = f"{CONNECT}; a = [socket.create_connection(s.getpeername()) for _ in range(19)]"


class ServerTest(unittest.TestCase):
    @contextlib.contextmanager
    def starting(self, *command, change=""):
        """Start mathserver.py, changed; yield the process and its address."""
        code = f"from tests import mathserver as server; {change}; server.main()"
        line = (*COMMAND, code) if change else SERVER
        with started(*line, "--port", 0, *command, cwd=support.ROOT) as process:
            listening = process.stderr.readline().decode()
            self.assertIn(": listening on 127.0.0.1 port ", listening)
            yield process, ("127.0.0.1", int(listening.split()[-1]))

    def assert_ending(self, command, status, words, change=""):
        """Run it with a command that may read the port; check how that ends."""
        with self.starting(*command, change=change) as (process, address):
            stdout, stderr, ended = finish(process, b"%d\n" % address[1])
        self.assertEqual(ended, status, stderr)
        output = stdout.decode().replace(os.linesep, "\n") + stderr
        self.assertRegex(output, rf"\A{words}\Z")
        return stdout

    def test_it_serves_its_command_and_has_a_new_secret_each_time(self):
        lab = (*COMMAND, LAB, *support.LAB4, "127.0.0.1")
        secret = r"([!-~]{8})\n.*: secret: b'\1' for .*\n"
        first = self.assert_ending(lab, 0, secret)
        self.assertNotEqual(self.assert_ending(("--", *lab), 0, secret), first)

    def test_it_ends_with_the_status_of_its_command(self):
        posix = os.name == "posix"
        for code, status in (
            ("sys.exit(len(sys.argv) * 3)", 6),
            ("os.kill(os.getpid(), 15)", 143 if posix else 15),
            ("os._exit(-5)", 251 if posix else 2**32 - 5),
        ):
            command = (*COMMAND, f"import os, sys; {code}", "--port")
            self.assert_ending(command, status, r".*: nobody .* port \d+ over TCP\n")
        self.assert_ending(("./nosuch",), 127, r"mathserver.py: .*'./nosuch'.*\n")

    def test_the_last_word_is_its_own(self):
        crash = (*COMMAND, f"{CONNECT}; s.close(); import time; time.sleep(0.2); s.x")
        words = r"Traceback[^\0]*\nAttribute.*\n.*: left .*\n"
        self.assert_ending(crash, 1, words, f"server.TRACEBACK = {support.TIMEOUT}")
        self.assert_ending((*COMMAND, CROWD), 0, r"(.*: left .*\n){20}")

    def test_it_says_when_threads_run_out(self):
        # Joined before its start, a thread raises what it does for want of threads.
        change = "server.Conversation.start = server.Conversation.join; "
        change += "server.time.sleep = str"
        command = (*COMMAND, CONNECT)
        self.assert_ending(command, 0, ".*: cannot serve a client: .*\n", change)

    @POSIX
    def test_it_says_when_files_run_out(self):
        change = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (12, 12))"
        command = (*COMMAND, f"{WAIT}; sys.exit(7)")
        with self.starting(*command, change=change) as (process, address):
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(socket.create_connection(address))
                self.assertIn(b"Too many open files", process.stderr.readline())
            _, stderr, status = finish(process, b"\n")
        self.assertEqual((stderr.count(": left "), status), (20, 7), stderr)
        self.assertLess(stderr.count("Too many"), 4, stderr)

    @POSIX
    def test_a_signal_ends_it_at_once(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            for command in ((), (*COMMAND, WAIT)):
                with self.starting(*command) as (process, _):
                    process.send_signal(number)
                    self.assertEqual(finish(process), (b"", "", -number), command)

    def test_it_says_when_nobody_connects(self):
        change = "server.LONELY = 0"
        with self.starting(*COMMAND, WAIT, change=change) as (process, address):
            self.assertIn(b"port %d over TCP" % address[1], process.stderr.readline())
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_a_client_that_outlives_the_command_is_not_awaited(self):
        serving = self.starting(*COMMAND, WAIT, change="server.GRACE = 0")
        with serving as (process, address), socket.create_connection(address):
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_a_client_may_outlast_the_command(self):
        serving = self.starting(*COMMAND, "pass", change="server.GRACE = 20")
        with serving as (_, address), socket.create_connection(address) as sock:
            self.assertEqual(converse(sock)[-1][:1], b"S")

    def test_stalled_clients_keep_nobody_waiting(self):
        with self.starting() as (_, address), contextlib.ExitStack() as stack:
            for _ in range(100):
                sock = stack.enter_context(socket.create_connection(address))
            self.assertEqual(converse(sock)[-1][:1], b"S")

    def test_its_port_is_its_own_and_free_at_once_when_it_ends(self):
        with self.starting() as (_, address):
            with socket.create_connection(address) as sock:
                sock.sendall(bytes(9))
                while sock.recv(9):
                    pass
            stdout, stderr, status = run(*SERVER, "--port", address[1])
            self.assertRegex(stderr, rf"\Amathserver.py: .*\b{address[1]}\b.*\n\Z")
            self.assertEqual((stdout, status), (b"", 1))
        with started(*SERVER, "--port", address[1]) as process:
            self.assertIn(b" port %d" % address[1], process.stderr.readline())

    def test_its_options_are_few_and_checked(self):
        statuses = {"-h": 0, "--bind=203.0.113.1": 1, "--bind=a..b": 1, "--port=-1": 2}
        statuses.update({"--port=65536": 2, "--secret=1": 2})
        lines = [(*SERVER, option) for option in statuses]
        for (*_, option), (stdout, stderr, status) in support.each(run, lines).items():
            self.assertEqual(status, statuses[option], option)
            self.assertEqual(b"(default: 8000)" in stdout, option == "-h")
            self.assertEqual(stderr.count("mathserver.py: "), min(status, 1), stderr)


if __name__ == "__main__":
    unittest.main()
