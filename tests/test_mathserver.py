"""Tests of mathserver.py: the words of its log, its conversations, the command."""

import contextlib
import os
import re
import signal
import socket
import struct
import sys
import time
from typing import Any
from unittest import mock

import lab4
from tests import mathserver, support
from tests.support import POSIX, PYTHON, Outcome, TestCase, finish, run, started

# Other times for most tests, in the names of mathserver.py.
TIMES: Any = {"PAUSE": 0.0002, "LONGEST_PAUSE": 0.1, "SECRET_PAUSE": 0.0002}
TIMES.update(SILENCE=20, TRACEBACK=0)
REAL_TIMES: Any = {name: getattr(mathserver, name) for name in TIMES}
PHRASE = "SQ3f81c2"
README = (support.ROOT / "README.md").read_text(encoding="utf-8")
QUESTION = bytes.fromhex("51 38b27aa7 2b10728f")
ASKED = "951220903 + 722498191 (51 38 b2 7a a7 2b 10 72 8f)"
RIGHT = bytes.fromhex("63c2ed36")
EQUATION = f"{ASKED} is 1673719094 (63 c2 ed 36), not"
SUMS = [0x00010203, 0xFF030405]  # the right answers to two earlier questions
CAUSES = (  # wrong answers to QUESTION, and what is said to be the cause
    (RIGHT[:3], "too few bytes"),
    (RIGHT[::-1], "the right sum, sent as little-endian"),
    (bytes(4) + RIGHT, "the right sum, in 8 bytes instead of 4"),
    ((b"A" + RIGHT) * 17, "the right sum, more than once: send it once, and empty the"),
    (QUESTION, "the numbers themselves, not their sum"),
    (QUESTION[1:5], "only the first number"),
    (QUESTION[5:9], "only the second number"),
    (b"\x36\xec\xc2\x63", "the numbers read as little-endian"),
    (b"\x63\xc2\xec\x36", "the numbers read as little-endian, sent as little-endian"),
    (b"\x00\x00\x03\x47", "single bytes added"),
    (
        b"\x7c\x49\x25\x09\n",
        "bytes [0:4] + [5:9] (the numbers are [1:5] and [5:9]), in",
    ),
    (b"\xff\x03\x04\x05", "the sum of question 2, perhaps still in a buffer"),
    (b"\x62\xc6\xf3\x3e", "all sums so far added up"),
    (bytes(2048), "only zeros, as bytes(n) makes them"),
    (b"1673719094\n", "sent as text, not as a 4-byte integer"),
    (b"abcd", "a wrong answer: "),  # four letters may be chance
    (b"abc\0" + QUESTION + b" to", "a wrong answer, in too many bytes: "),
)
OUTPUTS = (  # how many clients got the secret, what they printed, whether it is right
    (1, PHRASE, True),
    (1, f"{PHRASE}\r\n", True),
    (2, f"{PHRASE}\n{PHRASE}\n", True),
    (0, "no secret", True),
    (1, "", False),
    (1, f"b'{PHRASE}'\n", False),
    (1, f"{PHRASE}\x02\n", False),
    (1, f"{PHRASE}\n\n", False),
    (2, f"{PHRASE}\n", False),
)


class ExplanationTest(TestCase):
    def test_a_wrong_answer_has_a_cause(self):
        for answer, cause in CAUSES:
            line = mathserver.explain_answer(QUESTION, answer, SUMS)
            self.assertTrue(line.startswith(cause), (answer, line))
            self.assertIn(f": {EQUATION} ", line)

    def test_an_early_answer_to_an_earlier_question_is_recognized(self):
        line = mathserver.explain_early(1, b"\xff\x03\x04\x05", SUMS)
        self.assertIn("after only 1 of 9 bytes: the answer to question 2, ", line)

    def test_a_client_that_closes_between_frames_is_told_to_go_on(self):
        line = mathserver.explain_end(b"")
        self.assertIn("after 0 of 9 bytes: go on until S comes, all on this ", line)

    @mock.patch.object(mathserver, "PHRASE", PHRASE)
    def test_only_the_phrase_is_a_right_output(self):
        for count, output, is_right in OUTPUTS:
            line = mathserver.explain_output(output.encode(), count)
            wrong = f"the client printed {output!r}, not just the phrase"
            self.assertEqual(line, "" if is_right else wrong)

    @mock.patch.object(mathserver, "PHRASE", PHRASE)
    def test_the_readme_shows_lines_of_the_log(self):
        lines = (
            f"client 1: secret: {PHRASE} for 8 right answers; print just that",
            mathserver.explain_early(7, b"\x38\xb2\xa5\xb7", []),
            mathserver.explain_answer(QUESTION, RIGHT[::-1], []),
            mathserver.explain_output(f"b'{PHRASE}'\n".encode(), 1),
        )
        shown = re.findall("mathserver.py: (?:client 1: question 1: )?(.+)", README)
        self.assertLessEqual(set(lines), set(shown))


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock, size=9):
    """Return the next bytes, fewer if the stream ends before."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while len(data) < size and (piece := sock.recv(size - len(data))):
            data += piece
    return data


def send(sock, data):
    """Send data, close this side, and wait until the server closes the other."""
    with contextlib.suppress(OSError):  # the server may have closed already
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    receive(sock)


CLOSED = "the client closed its side of the connection after"
MISTAKES = (  # bytes of question 1 received, what is sent then, and the log's line
    (0, lambda _: b"\n", "1: the client sent 0a after .*: send just 4 bytes, and only"),
    (3, lambda _: b"hello", "1: the client sent 68 65 6c 6c 6f after only [3-8] of 9"),
    (
        3,
        lambda _: b"",
        f"1: {CLOSED} [3-8] of 9 bytes: call recv until all 9 are there",
    ),
    (9, lambda _: b"", rf"1: {CLOSED} all 9 bytes of \d+ .*: if it printed an error"),
    (9, lambda question: right(question)[:2], "1: too few bytes: "),
    (9, lambda question: right(question) * 10**6, "1: .*, more than once: "),
    (9, right, rf"2: {CLOSED} (\d of|all) 9 bytes"),
)


RIGHT_PARTS: Any = {
    "is_secret": lambda frame: frame[:1] == b"S",
    "payload": lambda frame: frame[1:],
    "format": ">II",
    "answer": lambda total: total.to_bytes(4, "big"),
    "phrase": lambda text: text[1:],
}
WRONG_PARTS: Any = (  # each is wrong for some contents of a frame only
    {"is_secret": lambda frame: b"S" in frame},
    {"is_secret": lambda frame: b"Q" not in frame},
    {"is_secret": lambda frame: frame.decode(errors="ignore").encode() == frame},
    {"is_secret": lambda frame: frame.isascii()},
    {"is_secret": lambda frame: frame.isalnum()},
    {"payload": lambda frame: frame.strip()[1:]},
    {"payload": lambda frame: frame.rstrip(b"\0")[1:]},
    {"payload": lambda frame: frame.split(b"\0")[0][1:]},
    {"payload": lambda frame: frame.replace(b"\r\n", b"\n")[1:]},
    {"payload": lambda frame: frame.replace(b"Q", b"")},
    {"payload": lambda frame: frame.lstrip(b"Q")},
    {"payload": lambda frame: frame.split(b"Q")[1]},
    {"format": ">ii"},
    {"answer": lambda total: total.to_bytes((total.bit_length() + 7) // 8, "big")},
    {"answer": lambda total: bytes.fromhex(f"{total:x}")},
    {"answer": lambda total: total.to_bytes(4, "big").replace(b"\n", b"\r\n")},
    {"phrase": lambda text: text.lstrip("S")},
    {"phrase": lambda text: text.replace("S", "")},
    {"phrase": lambda text: text.split("S")[1]},
)


def answer_frames(sock, wrong_part):
    """Receive whole frames and return the phrase, as a client of these parts does."""
    part = {**RIGHT_PARTS, **wrong_part}
    while not part["is_secret"](frame := receive(sock)):
        numbers = struct.unpack(part["format"], part["payload"](frame))
        sock.sendall(part["answer"](sum(numbers)))
    return part["phrase"](frame.decode())


def receive_after_a_sleep(sock):
    time.sleep(0.3)
    return sock.recv(9)


def sleep_before_the_phrase(sock):
    tag = receive(sock, 1)
    if tag == b"Q":
        return tag + receive(sock, 8)
    time.sleep(0.1)
    return tag + sock.recv(8)


class ConversationTest(TestCase):
    def setUp(self):
        super().setUp()
        patch = mock.patch.multiple(mathserver, PHRASE=PHRASE, **TIMES)
        patch.start()
        self.addCleanup(patch.stop)

    def converse(self, client, *arguments):
        """Let a client talk to the server; return its result and the log's lines."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname(), self.patience)
            self.thread = mathserver.Conversation("client 1", server.accept()[0])
        with self.assertLogs() as log:
            self.log = log
            self.thread.start()
            try:
                with sock:
                    result = client(sock, *arguments)
            except Exception as error:
                TestCase.patience = 2  # for what hangs after this
                self.thread.join(self.patience)
                raise AssertionError(f"the log: {log.output}") from error
            self.thread.join(self.patience)
        self.assertFalse(self.thread.is_alive(), log.output)
        start = "INFO:root:client 1: "
        return result, [line.replace(start, "", 1) for line in log.output]

    def test_right_answers_get_the_secret(self):
        for pick, count in ((min, 7), (max, 12)):
            with mock.patch("random.randint", pick):
                phrase, lines = self.converse(lab4.answer_questions)
            secret = f"secret: {PHRASE} for {count} right answers; print just that"
            self.assertEqual((phrase, lines), (PHRASE.encode(), [secret]))
            self.assertFalse(self.thread.has_mistake)

    def test_an_answer_may_come_in_pieces(self):
        def client(sock):
            while (frame := receive(sock))[:1] == b"Q":
                for byte in right(frame):
                    sock.sendall(bytes([byte]))
            return frame

        self.assertEqual(self.converse(client)[0], b"S" + PHRASE.encode())

    def test_each_mistake_is_explained_once(self):
        def client(sock, size, act):
            send(sock, act(receive(sock, size)))

        for size, act, words in MISTAKES:
            # Inside a frame, the client needs time to act before the next piece.
            pause = 0.0002 if size == 9 else 0.05
            with mock.patch.object(mathserver, "PAUSE", pause):
                (line,) = self.converse(client, size, act)[1]
            self.assertRegex(line, rf"\Aquestion {words}")
            self.assertTrue(self.thread.has_mistake)

    def test_a_client_that_does_not_close_after_the_secret_is_told(self):
        def client(sock, data):
            lab4.answer_questions(sock)
            sock.sendall(data)
            receive(sock)  # until the server closes

        for data, silence, words in (
            (b"sum!", 20, "the client sent 73 75 6d 21 after the secret: "),
            (b"", 0.2, "the client has not closed 0.2 s after the secret"),
        ):
            with mock.patch.object(mathserver, "SILENCE", silence):
                line = self.converse(client, data)[1][-1]
            self.assertIn(f"secret: {words}", line)
            self.assertTrue(self.thread.has_mistake)

    @mock.patch.object(mathserver, "SILENCE", 0.05)
    def test_a_client_that_is_silent_is_told_once(self):
        def client(sock):
            question = receive(sock)
            while not self.log.output:
                time.sleep(0.01)
            time.sleep(0.1)  # in which nothing should happen
            sock.sendall(right(question))
            return lab4.answer_questions(sock)

        phrase, lines = self.converse(client)
        self.assertEqual(phrase, PHRASE.encode())
        self.assertIn("question 1: the client has been silent for 0.05 s ", lines[0])
        self.assertEqual(sum("question 1: " in line for line in lines), 1, lines)
        self.assertTrue(self.thread.has_mistake)

    @mock.patch.object(mathserver, "SILENCE", 0.2)
    @mock.patch.object(mathserver, "make_question", lambda: QUESTION)
    def test_a_client_that_is_wrong_for_some_contents_does_not_pass(self):
        def client(sock, wrong_part):
            with contextlib.suppress(ValueError, OverflowError, struct.error):
                return answer_frames(sock, wrong_part)

        self.assertEqual(self.converse(client, {})[0], PHRASE)
        for wrong_part in WRONG_PARTS:
            phrase, lines = self.converse(client, wrong_part)
            self.assertNotEqual(phrase, PHRASE, (wrong_part, lines))
            self.assertTrue(self.thread.sums, "question 1 is answered rightly")

    @mock.patch.multiple(mathserver, **{**REAL_TIMES, "TRACEBACK": 0})
    @mock.patch("random.randint", min)
    def test_only_a_client_that_receives_until_9_bytes_gets_the_secret(self):
        def client(sock, receive_frame):
            frame = b""
            with contextlib.suppress(ConnectionError):
                while (frame := receive_frame(sock))[:1] == b"Q":
                    sock.sendall(right(frame.ljust(9, b"\0")))
            return frame == b"S" + PHRASE.encode()

        self.assertTrue(self.converse(client, receive)[0])
        for wrong in (receive_after_a_sleep, sleep_before_the_phrase):
            # On a busy machine pieces may join, and one conversation be lucky.
            always_right = all(self.converse(client, wrong)[0] for _ in range(3))
            self.assertFalse(always_right, wrong)

    def test_numbers_are_of_any_size_and_their_sum_has_4_bytes(self):
        questions = [mathserver.make_question() for _ in range(200)]
        numbers = [struct.unpack(">xII", question) for question in questions]
        self.assertLess(max(map(sum, numbers)), 2**32)
        self.assertGreater(max(map(min, numbers)), 2**29)

    @mock.patch.object(mathserver, "TRACEBACK", REAL_TIMES["TRACEBACK"])
    def test_the_log_lets_a_client_print_its_error_first(self):
        start = time.time()
        self.converse(lambda _: None)
        self.assertGreater(self.log.records[0].created - start, 0.25)


# Sets some times of mathserver.py, which are in {}, and runs it.
SERVER = "from tests import mathserver\n{}\nmathserver.main()"
# Commands for the server: they read the port from stdin, or nothing.
RUN_LAB4 = """
import lab4, sys
sys.argv = ["lab4.py", "127.0.0.1", input()]
lab4.main()
"""
ANSWER_NOTHING = """
import socket, time
sock = socket.create_connection(("127.0.0.1", int(input())))
print("ready", sock.recv(9))
time.sleep(60)
"""
CLOSE = """
import socket
socket.create_connection(("127.0.0.1", int(input()))).recv(1)
"""
LEAVE_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "input()"])
"""


NOBODY = "nobody has connected: check host, port and TCP (SOCK_STREAM)"
MATHSERVER = (*PYTHON, mathserver.__file__)
KILLED = 137 if os.name == "posix" else 9


class ServerTest(TestCase):
    @contextlib.contextmanager
    def starting(self, code=None, session=False, **times):
        """Start mathserver.py with code as its command; yield its process and port."""
        times = {**TIMES, **times}
        lines = [f"mathserver.{name} = {seconds}" for name, seconds in times.items()]
        line = [*PYTHON, "-c", SERVER.format("\n".join(lines)), "--port", 0]
        if code is not None:
            line += [*PYTHON, "-c", code]
        with started(*line, start_new_session=session) as process:
            first = process.stderr.readline().decode()
            self.assertRegex(first, "^mathserver.py: listening on 127.0.0.1 port [1-9]")
            yield process, int(first.split()[-1])

    def serve(self, code):
        with self.starting(code) as (process, port):
            return finish(process, f"{port}\n")

    def connect(self, port):
        return socket.create_connection(("127.0.0.1", port))

    def test_the_command_of_the_readme(self):
        (command,) = re.findall(r"\n(python3 tests/\S+ --port 8001 .*)\n", README)
        while True:
            with socket.create_server(("127.0.0.1", 0)) as server:
                words = {"python3": sys.executable, "8001": server.getsockname()[1]}
            outcome = run(*(words.get(word, word) for word in command.split()))
            if "cannot listen" not in outcome.stderr:  # another program was faster
                break
        self.assertRegex(outcome.stdout, r"\ASQ.{6}\n\Z", outcome)
        line = rf"\n.*: secret: {outcome.stdout[:8]} for .*\n\Z"
        self.assertRegex(outcome.stderr, line, outcome)
        self.assertEqual(outcome.status, 0, outcome)

    def test_each_run_is_different(self):
        streams = []
        for _ in range(2):
            with self.starting() as (_, port):
                sock = support.RecordedSocket(self.connect(port))
                lab4.answer_questions(sock)
                sock.close()
                streams.append(b"".join(sock.received))
        self.assertNotEqual(streams[0][:9], streams[1][:9])
        self.assertNotEqual(streams[0][-8:], streams[1][-8:])

    def test_its_status_is_that_of_its_command_or_1_after_a_mistake(self):
        for code, status, words in (
            (RUN_LAB4, 0, "secret: "),
            (RUN_LAB4 + "print('bye')", 1, "mathserver.py: the client printed 'SQ"),
            (RUN_LAB4 + "sys.exit(3)", 3, "secret: "),
            (CLOSE, 1, "client 1: question 1: the client closed "),
            ("", 1, f"mathserver.py: {NOBODY}\n"),
            ("import os; os.kill(os.getpid(), 9)", KILLED, NOBODY),
        ):
            outcome = self.serve(code)
            self.assertEqual(outcome.status, status, (code, outcome))
            self.assertEqual(outcome.stderr.count(words), 1, outcome)

    def test_it_copies_stdout_as_it_comes_and_leaves_stderr_alone(self):
        code = "import sys; print('out'); print('err', file=sys.stderr); input()"
        with self.starting(code) as (process, _):
            self.assertEqual(process.stdout.readline().split(), [b"out"])
            self.assertEqual(process.stderr.readline().split(), [b"err"])

    def test_it_says_soon_that_nobody_has_connected(self):
        with self.starting("input()", SILENCE=0.1) as (process, _):
            self.assertIn(NOBODY, process.stderr.readline().decode())
            self.assertEqual(finish(process, "\n").stderr, "")

    @POSIX
    def test_ctrl_c_ends_it_at_once_without_a_command(self):
        support.heed_ctrl_c(self)
        with self.starting() as (process, _):
            process.send_signal(signal.SIGINT)
            self.assertEqual(finish(process), Outcome("", "", -signal.SIGINT))

    @POSIX
    def test_ctrl_c_ends_the_command_and_nothing_is_logged_as_a_mistake(self):
        support.heed_ctrl_c(self)
        starting = self.starting(ANSWER_NOTHING, session=True, TRACEBACK=0.2)
        with starting as (process, port):
            process.stdin.write(b"%d\n" % port)
            self.assertIn(b"ready", process.stdout.readline())
            os.killpg(process.pid, signal.SIGINT)
            outcome = finish(process)
            self.assertEqual((outcome.stdout, outcome.status), ("", 130))
            self.assertNotIn("mathserver.py:", outcome.stderr)

    def test_a_child_that_keeps_stdout_does_not_hold_it(self):
        with self.starting(LEAVE_A_CHILD, GRACE=0) as (process, _):
            self.assertEqual(process.wait(self.patience), 1)

    def test_a_client_may_go_on_shortly_after_the_command(self):
        starting = self.starting("input()")
        with starting as (process, port), self.connect(port) as sock:
            process.stdin.close()
            time.sleep(0.2)  # in which the command ends
            self.assertTrue(lab4.answer_questions(sock))

    def test_stalled_clients_hold_up_neither_another_client_nor_the_end(self):
        stalled = contextlib.ExitStack()
        with self.starting("input()", GRACE=0.3) as (process, port), stalled:
            for _ in range(100):
                stalled.enter_context(self.connect(port))
            with self.connect(port) as sock:
                self.assertTrue(lab4.answer_questions(sock))
            finish(process)

    def test_it_does_not_run_its_command_if_the_port_is_taken(self):
        with self.starting() as (_, port):
            outcome = run(*MATHSERVER, "--port", port, *PYTHON, "-c", "print('runs')")
            self.assertRegex(outcome.stderr, rf"\Amathserver.py: .*\b{port}\b.*\n\Z")
            self.assertEqual((outcome.stdout, outcome.status), ("", 1))

    def test_its_options_and_its_errors(self):
        for line, status, words in (
            ("--help", 0, "(default: 8000)\n"),
            ("--port 65536", 1, "mathserver.py: cannot listen: "),
            ("--port 0 no", 1, "mathserver.py: cannot run 'no': "),
            ("--port 0 a.py", 1, "cannot run 'a.py': write python3 before it\n"),
        ):
            outcome = run(*MATHSERVER, *line.split())
            self.assertEqual(outcome.status, status, outcome)
            self.assertIn(words, outcome.stdout + outcome.stderr)
