"""Tests of mathserver.py: what it asks, what its log says of a client, the command."""

import contextlib
import errno
import itertools
import os
import select
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
# A question, in the pieces in which it is sent, and the right answer.
PIECES, RIGHT = [b"Q\x01\x02", b"\x03\x04\x10\x20", b"\x30\x40"], b"\x11\x22\x33\x44"
QUESTION = b"".join(PIECES)
CARRY, HIGH = [b"Q\x02\xff\x42\xfe", b"\x7f\x04\x03\x85"], b"\x82\x03\x46\x83"
SUMS = [0x01010101, 0x02020202]  # the right answers to two earlier questions
SHORT = "only the first or the last bytes used: receive until all 9 are there"
CAUSES = (  # a question, a wrong answer and what is said to be the cause
    (PIECES, b"\x55\x11\x22\x33", "added bytes [0:4] and [4:8] instead of [1:5] and"),
    (PIECES, b"\0\x11\x22\x33", "[1:4] and [5:8] instead of [1:5] and [5:9]: the sl"),
    (PIECES, b"\0\0\x33\x44", "wrapped modulo 2**16"),
    (PIECES, b"\0\0\x04\x06", "the operands read as 16-bit integers"),
    (PIECES, b"\x01\x02\x03\x04", "only the first operand"),
    (PIECES, b"\x10\x20\x30\x40", "only the second operand"),
    (PIECES, b"\0\0\x01\x02", SHORT),  # the first piece
    (PIECES, b"\0\0\0\x40", SHORT),  # the last one
    (PIECES, b"\x40\x10\x20\0", SHORT),  # each at the start of a buffer
    (PIECES, b"\0\0\0\xaa", "single bytes added"),
    (PIECES, b"\0\0\0\xfb", "single bytes added"),  # the tag, too
    (PIECES, b"\0\0\0\x11", "single bytes added"),
    (PIECES, b"\x11\x22\x33\x95", "the tag added to the operands"),
    (CARRY, b"\x02\x03\x46\x83", "wrapped modulo 2**31"),
    (CARRY, b"\x83\x46\x03\x81", "the operands read as little-endian"),
    (PIECES, b"\x02\x02\x02\x02", "the sum of question 2"),
    (PIECES, b"\x14\x25\x36\x47", "all sums so far added up"),
    (CARRY, HIGH[::-1], "sent little-endian in 4 bytes"),
    (PIECES, RIGHT[::-1], "in 4 bytes; or the operands read as little-endian"),
    (PIECES, bytes(4) + RIGHT, "sent in 8 bytes instead of 4"),
    (PIECES, b"\0\t287454020\r\n", "sent as decimal text"),  # as Java's writeUTF does
    (PIECES, b"2874", "sent as decimal text"),
    (PIECES, b"0x11223344", "sent as hexadecimal text"),
    (CARRY, b"8203", "sent as hexadecimal text"),
    (PIECES, repr(RIGHT).encode(), "sent as the text of a bytes object"),
    (CARRY, b"\xc2\x82\x03F\xc2\x83", "sent as text, which changes bytes above 0x7F"),
    (CARRY, "\ufffd\3F\ufffd".encode(), "sent as text, which changes bytes above"),
    (PIECES, struct.pack("<f", 0x11223344), "sent as a float or a double"),
    (PIECES, struct.pack(">d", 0x11223344), "sent as a float or a double"),
    (PIECES, bytes(1024), "sent as bytes(sum), which is that many zero bytes"),
    (PIECES, QUESTION[1:], "the operands sent, not their sum"),
    (PIECES, b"Q" + RIGHT, "sent with b'Q' before it"),
    (PIECES, RIGHT + b"\n", r"sent with b'\n' after it"),
    (PIECES, RIGHT * 6, "sent 6 times"),
    (PIECES, b"287454020" * 3, "sent as decimal text, sent 3 times"),
    (CARRY, b"\x81\x03\x46\x83", "read as little-endian, sent little-endian in 4"),
)
NO_CAUSES = (  # answers to the first question, and how they are shown
    (b"\0\0\0\x23", r"35 (b'\x00\x00\x00#')"),
    (bytes(4), r"0 (b'\x00\x00\x00\x00')"),
    (b"1690", "825637168 (b'1690')"),  # the start of the first operand
    (b"hello\n", r"6 bytes (b'hello\n')"),
    (bytes(33), f"33 bytes ({bytes(32)!r})"),
)
LEAVINGS: Any = (  # bytes read, bytes of an answer, sums before, what is said
    (b"", b"", SUMS, "left after right answer 2, before reading all 9 bytes of"),
    (QUESTION[:8], b"", [], "left before reading all 9 bytes of a frame: receive"),
    (QUESTION, b"", SUMS, "sent 0 of the 4 bytes of an answer, and left: it crashed"),
    (QUESTION, b"ab", [], "it crashed on 16909060 + 270544960, waited for more, or"),
    (b"".join(CARRY), b"", SUMS, "+ 2130969477 (the first sum too big for a signed i"),
    (b"".join(CARRY), b"", [2**31], "crashed on 50283262 + 2130969477, waited for"),
)


class ExplanationTest(unittest.TestCase):
    def test_a_wrong_answer_has_a_cause(self):
        for pieces, answer, cause in CAUSES:
            line = mathserver.explain_answer(pieces, answer, SUMS)
            self.assertIn(cause, line.partition("): ")[2], answer)

    def test_an_answer_that_fits_no_mistake_has_no_cause(self):
        equation = r"""16909060 + 270544960 is 287454020 (b'\x11"3D'), not """
        for answer, shown in NO_CAUSES:
            line = mathserver.explain_answer(PIECES, answer, SUMS)
            self.assertEqual(line, equation + shown)

    def test_leaving_is_explained(self):
        for *state, words in LEAVINGS:
            self.assertIn(words, mathserver.explain_leaving(*state), state)
        self.assertEqual(mathserver.explain_leaving(b"S12345678", b"", SUMS), "")

    def test_bytes_that_come_too_early_are_explained(self):
        line = mathserver.explain_early(2, bytes(99))
        self.assertIn(f"{bytes(32)!r} after only 2 of 9 bytes: send nothing", line)


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock):
    """Return the next 9 bytes, fewer if the stream ends before."""
    with sock.makefile("rb") as stream:
        return stream.read(9)


def converse(sock):
    """Answer each question; return all frames, the last of which is the secret."""
    frames = [receive(sock)]
    while frames[-1][:1] == b"Q":
        sock.sendall(right(frames[-1]))
        frames.append(receive(sock))
    return frames


# A test may set other values, which are undone after it, too.
@mock.patch.multiple(mathserver, HINT=support.TIMEOUT, PAUSE=0.001)
class ConversationTest(unittest.TestCase):
    @contextlib.contextmanager
    def talking(self, *lines, stops=()):
        """Yield a client's socket and the server's; then compare the log to `lines`."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname())
            accepted, address = server.accept()
        served = support.RecordedSocket(accepted, stops)
        talk = mathserver.Conversation((served, address), PHRASE, mock.Mock())
        with self.assertLogs(mathserver.LOG) as log:
            talk.start()
            with sock:
                yield sock, served
            talk.join(support.TIMEOUT)
        self.assertEqual(len(log.output), len(lines), log.output)
        for line, pattern in zip(log.output, lines):
            self.assertRegex(line, rf":127\.0\.0\.1 port {address[1]}: {pattern}")

    def test_right_answers_get_the_secret(self):
        for pick, questions, pieces in ((min, 5, 2), (max, 12, 4)):
            picking = mock.patch("random.randint", lambda *ends, pick=pick: pick(ends))
            line = f"secret: {PHRASE!r} for {questions} right answers"
            with picking, self.talking(line) as (sock, served):
                frames = converse(sock)
                self.assertEqual(sock.recv(1), b"")
                no_delay = served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                self.assertTrue(no_delay, "the kernel may join pieces")
            self.assertEqual(frames[questions:], [b"S" + PHRASE])
            self.assertEqual(b"".join(served.sent), b"".join(frames))
            self.assertEqual(len(served.sent), pieces * (questions + 1))

    def test_operands_and_cuts_are_random(self):
        questions, cuts = [], {0}
        for _ in range(8):
            with self.talking("secret: ") as (sock, served):
                questions += converse(sock)[:-1]
            cuts.update(end % 9 for end in itertools.accumulate(map(len, served.sent)))
        self.assertEqual(cuts, set(range(9)))
        for drawn in zip(*(struct.unpack(">xII", question) for question in questions)):
            self.assertTrue(min(drawn) < 2**30 < max(drawn) < 2**31, drawn)

    def test_a_wrong_answer_may_be_explained_by_an_earlier_question(self):
        line = r"question 2: .*\): the sum of question 1$"
        with self.talking(line) as (sock, _):
            answer = right(receive(sock))
            sock.sendall(answer)
            receive(sock)
            sock.sendall(answer)

    def test_what_follows_an_answer_counts_as_part_of_it(self):
        line = r"question 1: .*: sent with b'\\n\\r' after it$"
        with self.talking(line, stops=[4, 5]) as (sock, _):
            sock.sendall(right(receive(sock)) + b"\n\r")
            self.assertEqual(sock.recv(9), b"")

    def test_an_endless_answer_is_cut_off(self):
        line = r"question 1: .* not 1024 bytes .*bytes\(sum\)"
        with self.talking(line) as (sock, served):
            receive(sock)
            with contextlib.suppress(ConnectionError):
                sock.sendall(bytes(10**7))
        self.assertLess(len(b"".join(served.received)), 2 * mathserver.LIMIT)

    def test_what_comes_before_the_question_is_too_early(self):
        mathserver.PAUSE = support.TIMEOUT  # so that the client sends first
        for data in (b"1234", b"hello"):
            line = f"question 1: the client sent {data!r} after only 0 of 9 bytes"
            with self.talking(line) as (sock, _):
                sock.sendall(data)
                self.assertEqual(sock.recv(9), b"")

    def test_the_log_says_that_a_client_leaves_instead_of_answering(self):
        for size in range(4):
            with self.talking(f"question 1: .* {size} of the 4 bytes") as (sock, _):
                sock.sendall(right(receive(sock))[:size])

    def test_the_log_says_that_a_client_leaves_after_an_answer(self):
        with self.talking("question 2: left after right answer 1") as (sock, _):
            question = receive(sock)
            mathserver.PAUSE = support.TIMEOUT  # so that the end comes first
            sock.sendall(right(question))

    @unittest.skipUnless(sys.platform == "linux", "a reset is certain only on Linux")
    def test_the_log_says_that_a_client_leaves_bytes_unread(self):
        for size in (1, 9):
            with self.talking("question 1: left before reading all") as (sock, _):
                while len(sock.recv(size, socket.MSG_PEEK)) < size:
                    pass

    @unittest.skipUnless(sys.platform == "linux", "a reset is certain only on Linux")
    def test_a_reset_is_noticed_even_after_the_end_of_the_stream(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
            talk = mathserver.Conversation(server.accept(), PHRASE, mock.Mock())
        with talk.sock:
            talk.sock.sendall(b"unread")  # which is answered with a reset
            reset = select.poll()
            reset.register(talk.sock, 0)  # for errors only
            reset.poll(1000 * support.TIMEOUT)
            self.assertRaises(ConnectionResetError, talk.receive, support.TIMEOUT)

    def test_what_comes_after_the_secret_is_no_answer(self):
        with self.talking("secret: b'open it!'", "secret: sent b'sum!'") as (sock, _):
            converse(sock)
            sock.sendall(b"sum!")


SERVER = (*PYTHON, mathserver.__file__)
COMMAND = (*PYTHON, "-c")  # and code: a command to serve
WAIT = (*COMMAND, "import sys; sys.stdin.readline()")
LAB = "import subprocess, sys; sys.exit(subprocess.call([*sys.argv[1:], input()]))"


class ServerTest(unittest.TestCase):
    @contextlib.contextmanager
    def starting(self, *command, change=""):
        """Start mathserver.py after a change to it; yield its process and address."""
        code = f"from tests import mathserver as server; {change}; server.main()"
        line = (*COMMAND, code) if change else SERVER
        with started(*line, "--port", 0, *command) as process:
            listening = process.stderr.readline().decode()
            self.assertIn(": listening on 127.0.0.1 port ", listening)
            yield process, ("127.0.0.1", int(listening.split()[-1]))

    def assert_ending(self, command, status, words):
        """Serve a command, which may read the port from stdin; check how that ends."""
        with self.starting(*command) as (process, address):
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

    def test_the_log_explains_after_the_command_has_printed_its_traceback(self):
        change = f"server.TRACEBACK = {support.TIMEOUT}"
        crash = (*COMMAND, "input(); nothing")
        with self.starting(*crash, change=change) as (process, address):
            for _ in range(20):
                socket.create_connection(address).close()
            _, stderr, status = finish(process, b"\n")
        self.assertRegex(stderr, r"\ATraceback[^\0]*\nName.*\n(.*: left .*\n){20}\Z")
        self.assertEqual(status, 1)

    def test_silence_is_told_once(self):
        serving = self.starting(*WAIT, change="server.HINT = 0.001; server.GRACE = 0.1")
        with serving as (process, address), socket.create_connection(address) as sock:
            question = receive(sock)
            self.assertIn(b"question 1: silent", process.stderr.readline())
            sock.sendall(right(question))
            self.assertEqual(receive(sock)[:1], b"Q")
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_it_says_when_threads_run_out(self):
        # join raises RuntimeError here, as start does when threads run out.
        change = "server.Conversation.start = server.Conversation.join"
        with self.starting(change=change) as (process, address):
            with socket.create_connection(address) as sock:
                self.assertEqual(sock.recv(1), b"")
            process.kill()
            stderr = finish(process)[1]
            self.assertRegex(stderr, r"\A.*: cannot serve a client: .*\n\Z")

    @POSIX
    def test_it_says_when_files_run_out(self):
        change = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (12, 12))"
        command = (*COMMAND, "input(); raise SystemExit(7)")
        words = os.strerror(errno.EMFILE)
        with self.starting(*command, change=change) as (process, address):
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(socket.create_connection(address))
                self.assertIn(words, process.stderr.readline().decode())
            _, stderr, status = finish(process, b"\n")
        self.assertEqual((stderr.count(": left "), status), (20, 7), stderr)
        self.assertLess(stderr.count(words), 4, stderr)

    @POSIX
    def test_a_signal_ends_it_at_once(self):
        cases = itertools.product((signal.SIGINT, signal.SIGTERM), ((), WAIT))
        for number, command in cases:
            with self.starting(*command) as (process, _):
                process.send_signal(number)
                self.assertEqual(finish(process), (b"", "", -number), command)

    def test_it_says_when_nobody_connects(self):
        with self.starting(*WAIT, change="server.LONELY = 0") as (process, address):
            self.assertIn(b"port %d over TCP" % address[1], process.stderr.readline())
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_a_client_that_goes_on_long_after_the_command_is_not_awaited(self):
        serving = self.starting(*WAIT, change="server.GRACE = 0")
        with serving as (process, address), socket.create_connection(address):
            self.assertEqual(finish(process, b"\n"), (b"", "", 0))

    def test_a_client_may_go_on_shortly_after_the_command(self):
        serving = self.starting(*WAIT, change="server.GRACE = 20")
        with serving as (process, address), socket.create_connection(address) as sock:
            process.stdin.close()  # which ends the command
            self.assertEqual(converse(sock)[-1][:1], b"S")

    def test_a_client_is_served_while_100_others_stall(self):
        with self.starting() as (_, address), contextlib.ExitStack() as stack:
            for _ in range(100):
                sock = stack.enter_context(socket.create_connection(address))
            self.assertEqual(converse(sock)[-1][:1], b"S")

    def test_its_port_is_taken_while_it_runs_and_free_once_it_ends(self):
        with self.starting() as (_, address), socket.create_connection(address) as sock:
            converse(sock)
            sock.recv(1)  # the server closes first, which leaves its port in TIME_WAIT
            stdout, stderr, status = run(*SERVER, "--port", address[1])
            self.assertRegex(stderr, rf"\Amathserver.py: .*\b{address[1]}\b.*\n\Z")
            self.assertEqual((stdout, status), (b"", 1))
        with started(*SERVER, "--port", address[1]) as process:
            self.assertIn(b" port %d" % address[1], process.stderr.readline())

    def test_its_options_are_few_and_checked(self):
        for option in ("-h", "--bind=a..b", "--port=-1", "--port=65536", "--secret=1"):
            stdout, stderr, status = run(*SERVER, option)
            self.assertEqual(status, {"-h": 0, "--bind=a..b": 1}.get(option, 2), option)
            self.assertEqual(b"(default: 8000)" in stdout, option == "-h")
            self.assertEqual(stderr.count("mathserver.py: "), min(status, 1), stderr)


if __name__ == "__main__":
    unittest.main()
