"""Tests of lab4.py: the protocol, the script, and within another program."""

import ast
import contextlib
import io
import itertools
import os
import re
import signal
import socket
import struct
from unittest import mock

import lab4
from tests import support
from tests.support import POSIX, PYTHON, Outcome, RecordedSocket, TestCase, finish, run

SCRIPT = support.ROOT / "lab4.py"
LAB4 = (*PYTHON, SCRIPT)
# Each integer is the same in both byte orders: only one test is about the order.
QUESTION = b"Q\x01\x02\x02\x01\x03\x05\x05\x03"
ANSWER = b"\x04\x07\x07\x04"
PHRASE = b" \x00\xff\xc3\xa9\x1b[\n"  # not all UTF-8, white space at both ends
SECRET = b"S" + PHRASE
PRINTED = " \x00\\xff\u00e9\x1b[\n\n"
SYSTEM_ERROR = r"\[(Errno|WinError) \d+\] .+"


class ProtocolTest(TestCase):
    @contextlib.contextmanager
    def receiving(self, stream, stops=()):
        """Yield a socket at which a stream arrives, a stop at a time, and ends."""
        near, far = socket.socketpair()
        with near, RecordedSocket(far, stops) as sock:
            near.sendall(stream)
            near.shutdown(socket.SHUT_WR)
            yield sock

    def answer(self, first, second):
        question = struct.pack(">cII", b"Q", first, second)
        with self.receiving(question + SECRET) as sock:
            lab4.answer_questions(sock)
            return b"".join(sock.sent)

    def test_a_frame_may_arrive_in_any_pieces(self):
        for count in range(9):
            for cuts in itertools.combinations(range(1, 9), count):
                stops = [*cuts, *(9 + cut for cut in cuts)]
                with self.receiving(QUESTION + SECRET, stops) as sock:
                    self.assertEqual(lab4.answer_questions(sock), PHRASE, cuts)
                    self.assertEqual(sock.sent, [ANSWER], cuts)

    def test_a_whole_question_takes_one_recv_and_one_send(self):
        with self.receiving(QUESTION * 2 + SECRET) as sock:
            lab4.answer_questions(sock)
            self.assertEqual(sock.received, [QUESTION, QUESTION, SECRET])
            self.assertEqual(sock.sent, [ANSWER, ANSWER])

    def test_integers_are_big_endian(self):
        self.assertEqual(self.answer(0x01020304, 0x10203040), b"\x11\x22\x33\x44")

    def test_a_sum_wraps_at_32_bits(self):
        edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
        for first, second in itertools.product(edges, repeat=2):
            answer = int.from_bytes(self.answer(first, second), "big")
            self.assertEqual(answer, (first + second) % 2**32, (first, second))

    def test_every_other_tag_is_refused(self):
        for tag in set(range(256)) - set(b"QS"):
            frame = bytes([tag]) + PHRASE
            refused = self.assertRaisesRegex(ValueError, re.escape(repr(frame)))
            with self.receiving(frame) as sock, refused:
                lab4.answer_questions(sock)

    def test_an_early_end_is_an_error_that_counts_the_bytes(self):
        for frame, size in itertools.product((QUESTION, SECRET), range(9)):
            count = f"^the stream ended after {size} of 9 bytes$"
            early = self.assertRaisesRegex(EOFError, count)
            with self.receiving(frame[:size]) as sock, early:
                lab4.answer_questions(sock)


@contextlib.contextmanager
def connected(host="127.0.0.1", **options):
    """Start lab4.py; yield its process and the server's end of its connection."""
    with socket.create_server((host, 0)) as server:
        starting = support.started(*LAB4, host, server.getsockname()[1], **options)
        with starting as process, accept(server, process) as peer:
            yield process, peer


def accept(server, process):
    """Return the connection that a process makes; fail if it ends before."""
    server.settimeout(0.1)
    while True:
        ended = process.poll() is not None  # asked first: it may connect and then end
        with contextlib.suppress(socket.timeout):
            return server.accept()[0]
        if ended:
            raise AssertionError(f"lab4.py does not connect: {finish(process)}")


class ScriptTest(TestCase):
    def assert_fault(self, outcome, address, reason):
        """Check for one line on stderr, nothing on stdout, and status 1."""
        host, port = address
        start = f"lab4.py: cannot print the phrase from {host!r} port {port}: "
        line = rf"{re.escape(start)}{reason}\n"
        self.assertRegex(outcome.stderr, rf"\A{line}\Z", outcome)
        self.assertEqual(outcome, Outcome("", outcome.stderr, 1))

    def test_it_is_written_in_python_3_6(self):
        ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))

    def test_it_prints_the_phrase_as_text_from_an_address_or_a_name(self):
        for host in ("127.0.0.1", "localhost"):
            with connected(host) as (process, peer):
                peer.sendall(QUESTION + SECRET)
                self.assertEqual(finish(process), Outcome(PRINTED, "", 0))

    def test_it_has_help(self):
        outcome = run(*LAB4, "--help")
        self.assertEqual(outcome.status, 0, outcome)
        for words in ("lab4.py [-h] host port", "phrase", "address", "1 to 65535"):
            self.assertIn(words, outcome.stdout)

    @POSIX
    def test_it_is_executable(self):
        script = SCRIPT.read_bytes()
        if not os.access(SCRIPT, os.X_OK) or b"\r" in script or script[:1] == b"\xef":
            self.skipTest("no execute permission, Windows' line ends, byte order mark")
        self.assertIn("usage: lab4.py", run(SCRIPT, "--help").stdout)

    def test_wrong_arguments_are_a_usage_error(self):
        for arguments, reason in (
            ("", "host"),
            ("h", "port"),
            ("h http", "port"),
            ("h 8000.0", "port"),
            ("h -1", "port: -1 is not from 1 to 65535"),
            ("h 0", "port: 0 is not from 1 to 65535"),
            ("h 65536", "port: 65536 is not from 1 to 65535"),
            ("h 1 more", "more"),
        ):
            with self.subTest(arguments):
                outcome = run(*LAB4, *arguments.split())
                message = rf"\Ausage: .*\nlab4\.py: error: .*\b{reason}\b.*\n\Z"
                self.assertRegex(outcome.stderr, message, outcome)
                self.assertEqual(outcome, Outcome("", outcome.stderr, 2))

    def test_a_host_that_is_no_name_is_a_fault_at_any_port(self):
        for port in (1, 65535):
            self.assert_fault(run(*LAB4, "a..b", port), ("a..b", port), ".*label.*")

    def test_a_port_where_nobody_listens_is_a_fault(self):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))  # and does not listen
            address = server.getsockname()
            self.assert_fault(run(*LAB4, *address), address, SYSTEM_ERROR)

    def test_a_wrong_tag_is_a_fault(self):
        frame = b"q\x1b[2J\xff\n\a."
        with connected() as (process, peer):
            peer.sendall(frame)
            reason = f"neither .*{re.escape(repr(frame))}"
            self.assert_fault(finish(process), peer.getsockname(), reason)

    def test_an_early_end_is_a_fault(self):
        with connected() as (process, peer):
            peer.sendall(QUESTION[:5])
            peer.shutdown(socket.SHUT_WR)
            reason = "the stream ended after 5 of 9 bytes"
            self.assert_fault(finish(process), peer.getsockname(), reason)

    @POSIX
    def test_a_broken_pipe_is_a_fault(self):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe, connected(stdout=pipe) as (process, peer):
            peer.sendall(SECRET)
            outcome = finish(process)
        self.assertRegex(outcome.stderr, r"\Alab4\.py: cannot print .* Broken pipe\n")
        self.assertNotEqual(outcome.status, 0, outcome)

    @POSIX
    def test_ctrl_c_ends_it_with_130_and_no_message(self):
        support.heed_ctrl_c(self)
        with connected() as (process, peer):
            peer.sendall(QUESTION)
            peer.recv(4)  # from now on lab4.py waits for a frame
            process.send_signal(signal.SIGINT)
            # If the signal comes just before recv, Python sees it only after recv.
            peer.sendall(b"Q")
            self.assertEqual(finish(process), Outcome("", "", 130))


class WithinTest(TestCase):
    """lab4.py within another program, as in a grader that imports it."""

    def run_main(self):
        """Run main with a stand-in for answer_questions; return what it prints."""
        stdout = io.StringIO()
        with socket.create_server(("127.0.0.1", 0)) as server:
            argv = ["lab4.py", *map(str, server.getsockname())]
            with mock.patch("sys.argv", argv), contextlib.redirect_stdout(stdout):
                lab4.main()
        return stdout.getvalue()

    @mock.patch.object(lab4, "answer_questions", lambda _: PHRASE)
    def test_a_replaced_stdout_gets_the_phrase(self):
        self.assertEqual(self.run_main(), PRINTED)

    def test_lab4_sets_no_time_limit_of_its_own(self):
        def answer_questions(sock):
            limits.append(sock.gettimeout())
            return PHRASE

        self.addCleanup(socket.setdefaulttimeout, socket.getdefaulttimeout())
        limits: list = []
        for limit in (None, 9):
            socket.setdefaulttimeout(limit)
            with mock.patch.object(lab4, "answer_questions", answer_questions):
                self.run_main()
        self.assertEqual(limits, [None, 9])
