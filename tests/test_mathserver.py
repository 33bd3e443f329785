"""Tests of mathserver.py: what it asks, what its log says of a client, the command."""

import contextlib
import errno
import itertools
import os
import random
import re
import signal
import socket
import struct
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import mathserver, support
from tests.support import IPV6, POSIX, PYTHON, finish, run, started

PHRASE = "open it!"
QUESTION, RIGHT = bytes.fromhex("51 38b27aa7 2b10728f"), bytes.fromhex("63c2ed36")
SUMS = [0x00010203, 0x02030405]  # the right answers to two earlier questions
LITTLE, READ = "sent little-endian", "the operands read as"
CAUSES = (  # a wrong answer to QUESTION, and what is said to be the cause
    (RIGHT[::-1], f"the right sum, {LITTLE}"),
    (b"\x36\xec\xc2\x63", f"{READ} little-endian"),
    (b"\x63\xc2\xec\x36", f"{READ} little-endian, {LITTLE}"),
    (b"\x00\x00\xb3\x59", f"{READ} 16-bit integers"),
    (b"\x00\x00\x03\x47", "single bytes added"),
    (b"\x00\x00\x03\x98", "single bytes added"),  # the tag, too
    (b"\x00\x00\x00\x63", "single bytes added"),  # the first of each operand
    (b"\xf8\x63\xc2\xec", "bytes [0:4] + [4:8], not [1:5] + [5:9]"),
    (b"\x00\x63\xc2\xec", "bytes [1:4] + [5:8], not [1:5] + [5:9]"),
    (b"\xa7\x63\xc2\xec", "bytes [1:4] + [4:8], not [1:5] + [5:9]"),
    (b"\x38\xc2\xed\x36", "bytes [1:5] + [6:9], not [1:5] + [5:9]"),
    (b"\xb2\x8b\x19\xba", "bytes [2:6] + [6:9], not [1:5] + [5:9]"),
    (QUESTION[1:5], "only the first operand; or only the first 5 bytes"),
    (QUESTION[5:9], "only the second operand"),
    (b"\x00\x00\x00\x38", "only the first 2 bytes"),
    (b"\x38\xdd\x8b\x19", "only the first 8 bytes"),
    (b"\x02\x03\x04\x05", "the sum of question 2"),
    (b"\x65\xc6\xf3\x3e", "all sums so far added up"),
    (bytes(4) + RIGHT, "the right sum, in 8 bytes instead of 4"),
    (RIGHT[::-1] + b"\n", f"the right sum, {LITTLE}, in 5 bytes instead of 4"),
    (RIGHT * 256, "the right sum, sent again and again"),
    (b"0x63c2ed37\n", "sent as text"),
    (b"\0\n1673719094", "sent as text"),  # as Java's writeUTF does
    (b"1673719094".ljust(32, b"\0"), "sent as text"),  # as from a C buffer
    (b"1690", "sent as text"),
)
NO_CAUSES = (  # other answers to QUESTION, and how they are shown
    (b"\0\0\0\x23", "35 (00 00 00 23)"),
    (bytes(4), "0 (00 00 00 00)"),
    (b"abcd", "1633837924 (61 62 63 64)"),
    (b"\xffhello", "6 bytes (ff 68 65 6c 6c 6f)"),
    (bytes(33), f"33 bytes ({bytes(32).hex(' ')} ...)"),
    (bytes(mathserver.LIMIT), f"1024 or more bytes ({bytes(32).hex(' ')} ...)"),
)


class ExplanationTest(unittest.TestCase):
    def test_a_wrong_answer_has_a_cause(self):
        for answer, cause in CAUSES:
            line = mathserver.explain_answer(QUESTION, answer, SUMS)
            self.assertEqual(line.partition("): ")[2], cause, answer)

    def test_an_answer_that_fits_no_mistake_has_no_cause(self):
        equation = "951220903 + 722498191 (51 38 b2 7a a7 2b 10 72 8f) is 1673719094 "
        for answer, shown in NO_CAUSES:
            line = mathserver.explain_answer(QUESTION, answer, SUMS)
            self.assertEqual(line, f"{equation}(63 c2 ed 36), not {shown}")

    def test_few_small_answers_and_no_others_have_a_cause_by_chance(self):
        draw = random.Random(2).getrandbits
        others = [2**24 + draw(31) for _ in range(2000)]
        for answers, most in ((range(2000), 5), (others, 0)):
            lines = []
            for answer in answers:
                question = b"Q" + struct.pack(">II", draw(31), draw(31))
                data = struct.pack(">I", answer)
                lines.append(mathserver.explain_answer(question, data, SUMS))
            self.assertLessEqual(sum("): " in line for line in lines), most)

    def test_the_readme_has_the_words_of_the_log_and_waits_long_enough_for_them(self):
        readme = (support.ROOT / "README.md").read_text(encoding="utf-8")
        early = mathserver.explain_early(7, b"\x38\xb2\xa5\xb7", [])
        for line in (early, mathserver.explain_answer(QUESTION, RIGHT[::-1], [])):
            self.assertIn(f": question 1: {line}\n", readme)
        seconds = int(re.findall(r"wait (\d+) seconds", readme)[0])
        start = 0.5  # of the server and the client
        self.assertLess(start + mathserver.LATE + mathserver.SILENCE, seconds)

    def test_sleeping_for_1_s_is_not_enough_and_waiting_for_2_s_is(self):
        self.assertTrue(1.2 <= mathserver.LATE <= 1.6)


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock, size=9):
    """Return the next bytes, fewer if the stream ends before."""
    with sock.makefile("rb") as stream:
        return stream.read(size)


def converse(sock):
    """Answer each question; return all frames, the last of which is the secret."""
    frames = [receive(sock)]
    while frames[-1][:1] == b"Q":
        sock.sendall(right(frames[-1]))
        frames.append(receive(sock))
    return frames


CLOSED = r"closed the connection \(or its sending side\)"


# A test may set other values, which are undone after it, too.
@mock.patch.multiple(mathserver, SILENCE=support.TIMEOUT, PAUSE=0.001, LATE=0.001)
class ConversationTest(unittest.TestCase):
    @contextlib.contextmanager
    def talking(self, *lines, stops=()):
        """Yield a client's socket and the server's; then compare the log to `lines`."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname())
            accepted, address = server.accept()
        served = support.RecordedSocket(accepted, stops)
        talk = mathserver.Conversation(1, (served, address), PHRASE, mock.Mock())
        with self.assertLogs() as log:
            talk.start()
            with sock:
                yield sock, served
            talk.join(support.TIMEOUT)
        self.assertEqual(len(log.output), len(lines), log.output)
        for line, pattern in zip(log.output, lines):
            self.assertRegex(line, rf":127\.0\.0\.1 port {address[1]}: {pattern}")

    def test_right_answers_get_the_secret_after_a_pause_before_each_piece(self):
        mathserver.PAUSE = mathserver.LATE = 0.005
        for pick, questions, pieces in ((min, 5, 2), (max, 12, 4)):
            picking = mock.patch("random.randint", lambda *ends, pick=pick: pick(ends))
            line = f"secret: {PHRASE} for {questions} right answers$"
            start = time.perf_counter()
            with picking, self.talking(line) as (sock, served):
                frames = converse(sock)
                passed = time.perf_counter() - start
                self.assertEqual(sock.recv(1), b"")
                no_delay = served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                self.assertTrue(no_delay, "the kernel may join pieces")
            self.assertEqual(frames[questions:], [b"S" + PHRASE.encode()])
            self.assertEqual(b"".join(served.sent), b"".join(frames))
            self.assertEqual(len(served.sent), 4 + pieces * questions)
            self.assertGreater(passed, 0.004 * len(served.sent))

    def test_operands_and_cuts_are_random_after_question_1(self):
        questions, cuts = [], {0}
        for _ in range(8):
            with self.talking("secret: ") as (sock, served):
                questions += converse(sock)[:-1]
            sizes = [len(piece) for piece in served.sent]
            self.assertEqual(sizes[:4], [1, 2, 4, 2])  # both operands are cut
            cuts.update(end % 9 for end in itertools.accumulate(sizes[4:]))
        self.assertEqual(cuts, set(range(9)))
        for drawn in zip(*(struct.unpack(">xII", question) for question in questions)):
            self.assertTrue(min(drawn) < 2**30 < max(drawn) < 2**31, drawn)

    def test_what_comes_before_all_of_the_question_is_too_early(self):
        mathserver.LATE = support.TIMEOUT  # so that the client sends first
        for data, shown in ((b"1234", "31 32 33 34"), (b"\0", "00"), (b"hello", "'h")):
            line = f"question 1: the client sent {shown}.* after only 7 of 9 bytes: "
            with self.talking(line) as (sock, _):
                receive(sock, 7)
                sock.sendall(data)
                self.assertEqual(sock.recv(9), b"")
        mathserver.PAUSE = support.TIMEOUT
        with self.talking("question 1: .* after only 0 of 9 bytes") as (sock, _):
            sock.sendall(b"1234")

    def test_an_answer_may_be_that_to_an_earlier_question(self):
        mathserver.PAUSE = 0.02  # in which the client may answer 1 byte of 9
        line = "question 2: .*: (the answer to question 1 again|the sum of question 1)"
        for size in (1, 9):
            with self.talking(line) as (sock, _):
                answer = right(receive(sock))
                sock.sendall(answer)
                receive(sock, size)
                sock.sendall(answer)
                self.assertEqual(sock.recv(9), b"")

    def test_an_answer_must_be_4_bytes_and_big_endian(self):
        unfinished = f"{CLOSED}: perhaps it crashed"
        for change, words in (
            (lambda answer: answer[::-1], f"the right sum, {LITTLE}"),
            (lambda answer: answer + b"\n\r", "the right sum, in 6 bytes instead of 4"),
            (lambda answer: answer * 10**6, "the right sum, sent again and again"),
            (lambda answer: answer[:3], f", sent 3 of 4 bytes back and {unfinished}"),
            (lambda answer: answer[:0], f", sent 0 of 4 bytes back and {unfinished}"),
        ):
            talking = self.talking(f"question 1: .*{words}", stops=[4, 5])
            with talking as (sock, served), contextlib.suppress(ConnectionError):
                sock.sendall(change(right(receive(sock))))
                sock.shutdown(socket.SHUT_WR)
                sock.recv(9)  # which waits for the end
            self.assertLess(len(b"".join(served.received)), 2 * mathserver.LIMIT)

    def test_a_client_may_close_before_all_of_the_question_has_been_sent(self):
        mathserver.LATE = support.TIMEOUT
        line = f"question 1: the client {CLOSED} after 7 of 9 bytes .*: call recv again"
        with self.talking(line) as (sock, _):
            while len(sock.recv(7, socket.MSG_PEEK)) < 7:  # and leaves them unread
                pass

    def test_a_client_may_close_only_its_sending_side_after_an_answer(self):
        line = f"question 2: the client {CLOSED} after 0 of 9 .*: use this same connect"
        with self.talking(line) as (sock, _):
            question = receive(sock)
            mathserver.PAUSE = support.TIMEOUT  # so that the end comes first
            sock.sendall(right(question))
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(sock.recv(9), b"")

    def test_a_client_may_go_wrong_after_the_secret(self):
        for act, words in (
            (lambda sock: sock.setsockopt(*support.RESET), "reset the connection: "),
            (lambda sock: sock.sendall(b"sum!"), "sent 73 75 6d 21: "),
        ):
            lines = f"secret: {PHRASE} for", f"secret: the client {words}"
            with self.talking(*lines) as (sock, _):
                converse(sock)
                act(sock)


SERVER = (*PYTHON, mathserver.__file__)
COMMAND = (*PYTHON, "-c")  # and code: a command to serve
WAIT = (*COMMAND, "import sys; sys.stdin.readline()")
LAB = "import subprocess, sys; sys.exit(subprocess.call([*sys.argv[1:], input()]))"


class ServerTest(unittest.TestCase):
    @contextlib.contextmanager
    def starting(self, *command, change="", host="127.0.0.1"):
        """Start mathserver.py after a change to it; yield its process and address."""
        change = f"server.LATE = server.PAUSE = 0.001\n{change}"
        code = f"from tests import mathserver as server\n{change}\nserver.main()"
        line = (*COMMAND, code, "--bind", host)
        with started(*line, "--port", 0, *command) as process:
            listening = process.stderr.readline().decode()
            self.assertIn(f": listening on {host} port ", listening)
            yield process, (host, int(listening.split()[-1]))

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
        secret = r"([!-~]{8})\n.*: secret: \1 for .* right answers\n"
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

    def test_the_log_explains_after_the_traceback_in_the_order_of_connection(self):
        crash = (*COMMAND, "input(); nothing")
        change = f"server.TRACEBACK = {support.TIMEOUT}"
        lines = []
        with self.starting(*crash, change=change) as (process, address):
            for _ in range(20):
                with socket.create_connection(address) as sock:
                    lines.append(f".* port {sock.getsockname()[1]}: question 1: .*\n")
            _, stderr, status = finish(process, b"\n")
        self.assertRegex(stderr, rf"\ATraceback[^\0]*\nName.*\n{''.join(lines)}\Z")
        self.assertEqual(status, 1)

    def test_silence_is_told_once_and_what_has_come_back(self):
        starting = self.starting(change="server.SILENCE = 0.05")
        with starting as (process, address), contextlib.ExitStack() as stack:
            line = b""
            for _ in range(99):  # a machine at its limits may take too long to answer
                if b" sent 3 of 4 bytes back and has been silent" not in line:
                    sock = stack.enter_context(socket.create_connection(address))
                    answer = right(receive(sock))
                    sock.sendall(answer[:3])
                    line = process.stderr.readline()
            self.assertIn(b": question 1: the client was sent ", line)
            sock.sendall(answer[3:])
            self.assertEqual(receive(sock)[:1], b"Q")  # which is not told again
            sock = stack.enter_context(socket.create_connection(address))
            told = process.stderr.readline().decode()
            self.assertIn(f" port {sock.getsockname()[1]}: question 1: ", told)

    @POSIX
    def test_it_says_when_threads_run_out(self):
        # No thread gets a stack of this size.
        with self.starting(change="server.threading.stack_size(2**60)") as running:
            process, address = running
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
        self.assertEqual((stderr.count(" closed "), status), (20, 7), stderr)
        self.assertLess(stderr.count(words), 4, stderr)

    @POSIX
    def test_a_signal_ends_it_at_once(self):
        cases = itertools.product((signal.SIGINT, signal.SIGTERM), ((), WAIT))
        for number, command in cases:
            with self.starting(*command) as (process, _):
                process.send_signal(number)
                self.assertEqual(finish(process), (b"", "", -number), command)

    def test_it_says_when_nobody_connects(self):
        with self.starting(*WAIT, change="server.SILENCE = 0") as (process, address):
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

    @IPV6
    def test_it_may_listen_on_an_ipv6_address(self):
        with self.starting(host="::1") as (_, address):
            socket.create_connection(address).close()

    def test_its_port_is_taken_while_it_runs_and_free_once_it_ends(self):
        with self.starting() as (_, address), socket.create_connection(address) as sock:
            first = converse(sock)
            sock.recv(1)  # the server closes first, which leaves its port in TIME_WAIT
            stdout, stderr, status = run(*SERVER, "--port", address[1])
            self.assertRegex(stderr, rf"\Amathserver.py: .*\b{address[1]}\b.*\n\Z")
            self.assertEqual((stdout, status), (b"", 1))
        with started(*SERVER, "--port", address[1]) as process:
            self.assertIn(b" port %d" % address[1], process.stderr.readline())
            with socket.create_connection(address) as sock:
                self.assertNotEqual(receive(sock, 7), first[0][:7])  # not seeded

    def test_its_options_are_few_and_checked(self):
        for option in ("-h", "--bind=a..b", "--port=-1", "--port=65536", "--secret=1"):
            stdout, stderr, status = run(*SERVER, option)
            self.assertEqual(status, {"-h": 0, "--bind=a..b": 1}.get(option, 2), option)
            self.assertEqual(b"(default: 8000)" in stdout, option == "-h")
            self.assertEqual(stderr.count("mathserver.py: "), min(status, 1), stderr)


if __name__ == "__main__":
    unittest.main()
