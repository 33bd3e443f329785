"""Tests of mathserver.py: what it asks, what its log says of a client, the command."""

import contextlib
import itertools
import os
import random
import signal
import socket
import struct
import sys
import time
import unittest
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import lab4
from tests import mathserver, support
from tests.support import IPV6, POSIX, PYTHON, finish, run, started

SERVER = (*PYTHON, mathserver.__file__)
COMMAND = (*PYTHON, "-c")  # and code: a command to serve
WAIT = (*COMMAND, "import sys; sys.stdin.readline()")
LAB = "import subprocess, sys; sys.exit(subprocess.call([*sys.argv[1:], input()]))"
CLOSED = r"closed the connection \(or its sending side\)"
PHRASE, TEXT = "open it!", "sent as text, not as a 4-byte integer"
QUESTION, RIGHT = bytes.fromhex("51 38b27aa7 2b10728f"), bytes.fromhex("63c2ed36")
SUMS = [0x00010203, 0xFF030405]  # the right answers to two earlier questions
CAUSES = (  # a wrong answer to QUESTION, and what is said to be the cause
    (RIGHT[::-1], "the right sum, sent little-endian"),
    (b"\x36\xec\xc2\x63", "the operands read as little-endian"),
    (b"\x63\xc2\xec\x36", "the operands read as little-endian, sent little-endian"),
    (b"\x00\x00\xb3\x59", "the operands read as 16-bit integers"),
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
    (b"\xff\x03\x04\x05", "the sum of question 2"),
    (b"\x62\xc6\xf3\x3e", "all sums so far added up"),
    (bytes(4) + RIGHT, "the right sum, in 8 bytes instead of 4"),
    (RIGHT[::-1] + b"\n", "the right sum, sent little-endian, in 5 bytes instead of 4"),
    (RIGHT * 2, "the right sum, sent again and again"),
    (b"\0\n1673719094", TEXT),  # as Java's writeUTF does
    (b"0x63c2ed36\n".ljust(32, b"\0"), TEXT),  # as from a C buffer
    (b"1690", TEXT),
)
NO_CAUSES = (  # other answers to QUESTION, and how they are shown
    (bytes(4), "0 (00 00 00 00)"),
    (b"abcd", "1633837924 (61 62 63 64)"),
    (b"\xffhello", "6 bytes (ff 68 65 6c 6c 6f)"),
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
        for answers, most in ((range(2000), 5), (range(2**24, 2**32, 2**21 + 99), 0)):
            lines = []
            for answer in answers:
                question = b"Q" + struct.pack(">II", draw(31), draw(31))
                data = struct.pack(">I", answer)
                lines.append(mathserver.explain_answer(question, data, SUMS))
            self.assertLessEqual(sum("): " in line for line in lines), most)

    def test_the_readme_has_the_words_and_the_times_of_the_log(self):
        readme = (support.ROOT / "README.md").read_text(encoding="utf-8")
        early = mathserver.explain_early(7, b"\x38\xb2\xa5\xb7", SUMS)
        for line in (early, mathserver.explain_answer(QUESTION, RIGHT[::-1], [])):
            self.assertIn(f": question 1: {line}\n", readme)
        self.assertIn("wait 5 seconds", readme)  # both programs start in half a second
        self.assertLess(mathserver.LATE + mathserver.SILENCE, 4.5)
        self.assertTrue(1.2 <= mathserver.LATE <= 1.6)  # "2 seconds" for a whole run


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock, size=9):
    """Return the next bytes, fewer if the stream ends before."""
    with sock.makefile("rb") as stream:
        return stream.read(size)


# A test may set other values, which are undone after it, too.
@mock.patch.multiple(mathserver, SILENCE=20, WATCH=20, PAUSE=0.001, LATE=0.001)
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
        mathserver.PAUSE, mathserver.LATE = 0.004, 0.1
        for pick, questions, pieces in ((min, 5, 2), (max, 12, 4)):
            line = f"secret: {PHRASE} for {questions} right answers$"
            start = time.perf_counter()
            with mock.patch("random.randint", pick), self.talking(line) as (sock, peer):
                self.assertEqual(lab4.answer_questions(sock), PHRASE.encode())
                passed = time.perf_counter() - start
                self.assertEqual(sock.recv(1), b"")
                self.assertTrue(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertEqual(len(peer.sent), 4 + pieces * questions)
            self.assertGreater(passed, 0.1 + 0.003 * (len(peer.sent) - 1))

    def test_operands_and_cuts_are_random_after_question_1(self):
        questions, cuts = b"", {0}
        for _ in range(8):
            with self.talking("secret: ") as (sock, served):
                lab4.answer_questions(sock)
            questions += b"".join(served.sent)[:-9]
            sizes = [len(piece) for piece in served.sent]
            self.assertEqual(sizes[:4], [1, 2, 4, 2])  # both operands are cut
            cuts.update(end % 9 for end in itertools.accumulate(sizes[4:]))
        self.assertEqual(cuts, set(range(9)))
        for drawn in zip(*struct.iter_unpack(">xII", questions)):
            self.assertTrue(min(drawn) < 2**30 < max(drawn) < 2**31, drawn)

    def test_a_client_may_go_wrong_before_all_of_a_frame_has_been_sent(self):
        mathserver.LATE = support.TIMEOUT  # so that the client acts first
        for act, words in (
            (lambda sock: sock.sendall(b"\0"), "sent 00"),
            (lambda sock: sock.sendall(b"hello"), "sent 'hello'"),
            (lambda sock: sock.shutdown(socket.SHUT_WR), CLOSED),
            (lambda sock: sock.setsockopt(*support.RESET), CLOSED),
        ):
            line = f"question 1: the client {words} after .*7 of 9 .*: call recv"
            with self.talking(line) as (sock, _):
                receive(sock, 7)
                act(sock)
        mathserver.PAUSE = support.TIMEOUT
        with self.talking("question 1: .* 31 32 33 34 after only 0 of 9") as (sock, _):
            sock.sendall(b"1234")
        line = mathserver.explain_stop(b"S1234567", b"", SUMS)  # no question is left
        self.assertIn(" 8 of 9 bytes had been sent to it: call recv again", line)

    def test_an_answer_may_be_that_to_an_earlier_question(self):
        mathserver.PAUSE = 0.02  # in which the client may answer 1 byte of 9
        line = "question 2: .*: (the answer to question 1 again|the sum of question 1)"
        for size in (1, 9):
            with self.talking(line) as (sock, _):
                answer = right(receive(sock))
                sock.sendall(answer)
                receive(sock, size)
                sock.sendall(answer)
                self.assertLess(len(receive(sock)), 9)  # as the server closes

    def test_what_a_client_sends_before_it_closes_is_explained(self):
        for change, line in (
            (lambda answer: answer[::-1], "1: .*: the right sum, sent little-endian"),
            (lambda answer: answer * 10**6, "1: .*: the right sum, sent again"),
            (lambda answer: answer[:3], f"1: .* 3 of 4 .*{CLOSED}: perhaps it crashed"),
            (lambda answer: answer[:0], f"1: .* 0 of 4 .*{CLOSED}: perhaps it crashed"),
            (lambda answer: answer, f"2: .* {CLOSED} after 0 of 9 .*: use this same"),
        ):
            mathserver.PAUSE = 0.001
            talking = self.talking(f"question {line}", stops=[4, 5])
            with talking as (sock, served), contextlib.suppress(OSError):
                answer = right(receive(sock))
                mathserver.PAUSE = support.TIMEOUT  # so that the end comes first
                sock.sendall(change(answer))
                sock.shutdown(socket.SHUT_WR)
                sock.recv(9)  # which waits for the server to close the connection
            self.assertLess(len(b"".join(served.received)), 2 * mathserver.LIMIT)

    @POSIX
    def test_a_client_may_go_wrong_after_the_secret(self):
        for act, words in (
            (lambda sock: sock.setsockopt(*support.RESET), "reset the connection: "),
            (lambda sock: sock.sendall(b"sum!"), "sent 73 75 6d 21: "),
        ):
            with self.talking("secret: ", f"secret: the client {words}") as (sock, _):
                lab4.answer_questions(sock)
                act(sock)


class ServerTest(unittest.TestCase):
    @contextlib.contextmanager
    def starting(self, *command, change="", host="127.0.0.1"):
        """Start mathserver.py after a change to it; yield its process and address."""
        times = "server.LATE = server.PAUSE = 0.001\nserver.SILENCE = server.GRACE = 20"
        code = f"import tests.mathserver as server\n{times}\n{change}\nserver.main()"
        with started(*COMMAND, code, "--bind", host, "--port", 0, *command) as process:
            listening = process.stderr.readline().decode()
            self.assertIn(f": listening on {host} port ", listening)
            yield process, (host, int(listening.split()[-1]))

    def assert_ending(self, command, status, words):
        """Serve a command, which may read the port from stdin; check how that ends."""
        with self.starting(*command) as (process, address):
            stdout, stderr, ended = finish(process, b"%d\n" % address[1])
        self.assertEqual(ended, status, stderr)
        self.assertRegex(stdout.decode() + stderr, rf"\A{words}\Z")
        return stdout

    def test_it_serves_its_command_and_has_a_new_secret_each_time(self):
        lab = (*COMMAND, LAB, *support.LAB4, "127.0.0.1")
        secret = r"([!-~]{8})\n.*: secret: \1 for .* right answers\n"
        first = self.assert_ending(lab, 0, secret)
        self.assertNotEqual(self.assert_ending(("--", *lab), 0, secret), first)

    def test_it_ends_with_the_status_of_its_command(self):
        for code, status in (
            ("sys.exit(len(sys.argv) * 3)", 6),
            ("os.kill(os.getpid(), 15)", 143 if os.name == "posix" else 15),
            ("os._exit(-5)", 251 if os.name == "posix" else 2**32 - 5),
        ):
            command = (*COMMAND, f"import os, sys; {code}", "--port")
            self.assert_ending(command, status, r".*: nobody .* port \d+ over TCP .*\n")
        self.assert_ending(("./nosuch",), 127, r"mathserver.py: .*'./nosuch'.*\n")

    def test_the_log_explains_after_the_traceback_in_the_order_of_connection(self):
        lines = []
        crash = (*COMMAND, "input(); nothing")
        with self.starting(*crash, change="server.TRACEBACK = 9") as (process, address):
            for _ in range(20):
                with socket.create_connection(address) as sock:
                    lines.append(f".* port {sock.getsockname()[1]}: question 1: .*\n")
            stderr = finish(process, b"\n")[1]
        self.assertRegex(stderr, rf"\ATraceback[^\0]*\nName.*\n{''.join(lines)}\Z")

    def test_silence_is_told_once_and_what_has_come_back(self):
        starting = self.starting(change="server.SILENCE = 0.05")
        with starting as (process, address), contextlib.ExitStack() as stack:
            line = b""
            while b" sent 3 of 4 bytes back and has been silent" not in line:
                # On a machine at its limits, the 3 bytes may come too late: try again.
                sock = stack.enter_context(socket.create_connection(address))
                answer = right(receive(sock))
                sock.sendall(answer[:3])
                line = process.stderr.readline()
            sock.sendall(answer[3:])
            self.assertEqual(receive(sock)[:1], b"Q")  # which is not told again
            sock = stack.enter_context(socket.create_connection(address))
            self.assertIn(b" %d: " % sock.getsockname()[1], process.stderr.readline())

    @POSIX
    def test_it_says_when_threads_run_out(self):
        starting = self.starting(change="server.threading.stack_size(2**60)")  # too big
        with starting as (process, address), socket.create_connection(address) as sock:
            self.assertEqual(sock.recv(1), b"")
            process.kill()
            self.assertRegex(finish(process)[1], r"\A.*: cannot serve a client: .*\n\Z")

    @POSIX
    def test_it_says_when_files_run_out(self):
        change = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (12, 12))"
        with self.starting(*WAIT, change=change) as (process, address):
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(socket.create_connection(address))
                self.assertIn(b"client: [Errno 24] ", process.stderr.readline())
            _, stderr, status = finish(process, b"\n")
        self.assertEqual((stderr.count(" closed "), status), (20, 0), stderr)
        self.assertLess(stderr.count(" cannot serve "), 20, stderr)

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

    def test_a_client_may_go_on_shortly_after_the_command(self):
        serving = self.starting(*WAIT, change="server.PAUSE = 0.01")
        with serving as (process, address), socket.create_connection(address) as sock:
            process.stdin.close()  # which ends the command
            self.assertTrue(lab4.answer_questions(sock))

    def test_stalled_clients_hold_up_neither_another_client_nor_the_end(self):
        serving = self.starting(*WAIT, change="server.GRACE = 0")
        with serving as (process, address), contextlib.ExitStack() as stack:
            for _ in range(100):
                sock = stack.enter_context(socket.create_connection(address))
            self.assertTrue(lab4.answer_questions(sock))
            _, stderr, status = finish(process, b"\n")
            self.assertEqual((stderr.count("\n"), status), (1, 0), stderr)

    @IPV6
    def test_it_may_listen_on_an_ipv6_address(self):
        with self.starting(host="::1") as (_, address):
            socket.create_connection(address).close()

    def test_its_port_is_taken_while_it_runs_and_free_once_it_ends(self):
        with self.starting() as (_, address), socket.create_connection(address) as sock:
            first = receive(sock)
            sock.sendall(b"oops")
            sock.recv(1)  # the server closes first, which leaves its port in TIME_WAIT
            stdout, stderr, status = run(*SERVER, "--port", address[1])
            self.assertRegex(stderr, rf"\Amathserver.py: .*\b{address[1]}\b.*\n\Z")
            self.assertEqual((stdout, status), (b"", 1))
        with started(*SERVER, "--port", address[1], *WAIT) as process:
            self.assertIn(b" 127.0.0.1 port %d" % address[1], process.stderr.readline())
            with socket.create_connection(address) as sock:
                self.assertNotEqual(receive(sock, 7), first[:7])  # not seeded
            self.assertEqual(finish(process, b"\n")[2], 0)

    def test_its_options_are_few_and_checked(self):
        for option in ("-h", "--bind=a..b", "--port=-1", "--port=65536", "--secret=1"):
            stdout, stderr, status = run(*SERVER, option)
            self.assertEqual(status, {"-h": 0, "--bind=a..b": 1}.get(option, 2), option)
            self.assertEqual(b"(default: 8000)" in stdout, option == "-h")
            self.assertEqual(stderr.count("mathserver.py: "), min(status, 1), stderr)


if __name__ == "__main__":
    unittest.main()
