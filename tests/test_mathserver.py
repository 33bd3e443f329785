"""Tests of mathserver.py: the words of its log, its conversations, the command."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import socket
import struct
import time
import unittest
from typing import Any
from unittest import mock

import lab4
from tests import mathserver, support
from tests.support import POSIX, PYTHON, TIMEOUT, Outcome, finish, run, started

TIMES: Any = {"PAUSE": 0.001, "LONGEST_PAUSE": 0.1, "SECRET_PAUSE": 0.001}
TIMES.update(SILENCE=TIMEOUT, TRACEBACK=0)  # for most tests
REAL_TIMES = {name: getattr(mathserver, name) for name in TIMES}
PHRASE = "lO_2HEKb"
SECRET_LINE = f"secret: {PHRASE} for 5 right answers; print just that"
README = (support.ROOT / "README.md").read_text(encoding="utf-8")
QUESTION = bytes.fromhex("51 38b27aa7 2b10728f")
ASKED = "951220903 + 722498191 (51 38 b2 7a a7 2b 10 72 8f)"
RIGHT = bytes.fromhex("63c2ed36")
EQUATION = f"{ASKED} is 1673719094 (63 c2 ed 36), not"
SUMS = [0x00010203, 0xFF030405]  # the right answers to two earlier questions
NUMBERS = "(the numbers are [1:5] and [5:9])"
TEXT = "sent as text, not as a 4-byte integer"
CAUSES = (  # wrong answers to QUESTION, and what is said to be the cause
    (RIGHT[::-1], "the right sum, but sent little-endian"),
    (bytes(4) + RIGHT, "the right sum, in 8 bytes instead of 4"),
    (RIGHT * 2, "the right sum, sent again and again"),
    (QUESTION[1:5], "only the first number"),
    (QUESTION[5:9], "only the second number"),
    (b"\x36\xec\xc2\x63", "the numbers read as little-endian"),
    (b"\x63\xc2\xec\x36", "the numbers read as little-endian, but sent little-endian"),
    (b"\x00\x00\x03\x47", "single bytes added"),
    (b"\x00\x63\xc2\xec", f"bytes [1:4] + [5:8] {NUMBERS}"),
    (b"\xb2\x8b\x19\xba\n", f"bytes [2:6] + [6:9] {NUMBERS}, in 5 bytes instead of 4"),
    (b"\xff\x03\x04\x05", "the sum of question 2"),
    (b"\x62\xc6\xf3\x3e", "all sums so far added up"),
    (b"\0\n1673719094", TEXT),  # as Java's writeUTF does
    (b"0x63c2ed36\n".ljust(32, b"\0"), TEXT),  # as from a C buffer
)
NO_CAUSES = (  # other answers to QUESTION, and how they are shown
    (b"abcd", "1633837924 (61 62 63 64)"),
    (b"\xffhello", "6 bytes (ff 68 65 6c 6c 6f)"),
    (bytes(40), f"40 bytes ({bytes(32).hex(' ')} ...)"),
)
STOPS = (  # what was sent, what came back, earlier sums, and words of the log
    (QUESTION[:7], b"", SUMS[:0], "7 of 9 bytes: call recv again until all 9 "),
    (QUESTION[:7], b"", SUMS, "7 of 9 bytes: answer until S comes, all on this "),
    (b"Sopen it", b"", SUMS, "8 of 9 bytes: call recv again until all 9 are "),
    (QUESTION, b"", SUMS, f"{ASKED}: if it printed an error, fix that; if not, "),
    (QUESTION, b"\x63\xc2", SUMS, "sending 63 c2: an answer has 4 bytes"),
)


class ExplanationTest(unittest.TestCase):
    maxDiff = None

    def test_a_wrong_answer_has_a_cause(self):
        for answer, cause in CAUSES:
            with self.subTest(answer=answer):
                line = mathserver.explain_answer(QUESTION, answer, SUMS)
                self.assertEqual(line.partition(f": {EQUATION} ")[0], cause)

    def test_an_answer_that_fits_no_mistake_has_no_cause(self):
        for answer, shown in NO_CAUSES:
            line = mathserver.explain_answer(QUESTION, answer, SUMS)
            self.assertEqual(line, f"{EQUATION} {shown}")

    def test_a_client_that_stops_gets_advice(self):
        for frame, answer, sums, words in STOPS:
            line = mathserver.explain_stop("slept", frame, answer, sums)
            self.assertIn(f"the client slept after {words}", line)

    def test_an_early_answer_to_an_earlier_question_is_recognized(self):
        line = mathserver.explain_early(1, b"\xff\x03\x04\x05\n", SUMS)
        self.assertIn("after only 1 of 9 bytes: the answer to question 2 again", line)

    def test_the_readme_shows_lines_of_the_log(self):
        early = mathserver.explain_early(7, b"\x38\xb2\xa5\xb7", SUMS)
        wrong = mathserver.explain_answer(QUESTION, RIGHT[::-1], [])
        shown = re.findall(": question 1: (.*)|: (secret: .*)", README)
        self.assertEqual(shown, [("", SECRET_LINE), (early, ""), (wrong, "")])

    def test_the_readme_has_the_times_of_the_server(self):
        wait, late = map(int, re.findall(r"(\d+) seconds", README))
        self.assertLess(mathserver.LONGEST_PAUSE + mathserver.SILENCE, wait)
        self.assertEqual(mathserver.LONGEST_PAUSE, late)


def right(question):
    return struct.pack(">I", sum(struct.unpack(">xII", question)))


def receive(sock, size=9):
    """Return the next bytes, fewer if the stream ends before."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def send(sock, data):
    """Send data, close this side, and wait until the server closes the other."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        receive(sock)


def answer_twice(sock):
    answer = right(receive(sock))
    sock.sendall(answer)
    receive(sock, 1)
    send(sock, answer)


def answer_the_secret(sock):
    lab4.answer_questions(sock)
    send(sock, b"sum!")


CLOSED = "the client closed .* after"
MISTAKES = (  # a client, and the last line that the log has for it
    (receive, rf"question 1: {CLOSED} \d+ \+ "),
    (lambda sock: send(sock, right(receive(sock))[:3]), "question 1: .* sending "),
    (lambda sock: send(sock, right(receive(sock))), f"question 2: {CLOSED} "),
    (lambda sock: send(sock, right(receive(sock)) * 10**6), "question 1: .* again: "),
    (answer_twice, "question 2: .*(the answer to|the sum of) question 1"),
    (answer_the_secret, "secret: the client sent 73 75 6d 21 after the secret: "),
)
INSIDE_A_FRAME = (  # what a client does there, and the line that the log has for it
    (lambda sock: send(sock, b"hello"), "the client sent 'hello' after only [3-8] "),
    (socket.socket.close, f"{CLOSED} [3-8] of 9 bytes: "),
    (support.reset, f"{CLOSED} [3-8] of 9 bytes: "),
)


def receive_three_times(sock):
    time.sleep(0.1)
    frame = b""
    for _ in range(3):
        if len(frame) < 9:
            frame += sock.recv(9 - len(frame))
    return frame


def receive_the_secret_once(sock):
    tag = receive(sock, 1)
    return tag + (sock.recv(8) if tag == b"S" else receive(sock, 8))


WRONG_RECEIVERS = {
    "one recv": lambda sock: sock.recv(9),
    "8 bytes": lambda sock: receive(sock, 8),
    "a sleep and three recv": receive_three_times,
    "one recv for the secret": receive_the_secret_once,
}


# A test may set other times, which are undone after it, too.
@mock.patch.multiple(mathserver, **TIMES)
class ConversationTest(unittest.TestCase):
    maxDiff = None

    def converse(self, client):
        """Let a client talk to the server; return its result and the log's lines.

        The server's end of the connection is self.served, its thread self.thread.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname(), TIMEOUT)
            accepted, address = server.accept()
        self.served = support.RecordedSocket(accepted)
        self.thread = mathserver.Conversation((self.served, address), PHRASE)
        with self.assertLogs() as log:
            self.thread.start()
            try:
                with sock:
                    result = client(sock)
            except Exception as error:
                self.thread.join()
                raise AssertionError(f"the log: {log.output}") from error
            self.thread.join()
        start = f"INFO:root:127.0.0.1 port {address[1]}: "
        return result, [line.replace(start, "", 1) for line in log.output]

    def use_real_times(self):
        for name, seconds in REAL_TIMES.items():
            setattr(mathserver, name, seconds)

    @mock.patch("random.randint", min)
    def test_right_answers_get_the_secret(self):
        phrase, lines = self.converse(lab4.answer_questions)
        self.assertEqual((phrase, lines), (PHRASE.encode(), [SECRET_LINE]))

    def test_each_mistake_is_explained_once(self):
        for client, start in MISTAKES:
            lines = self.converse(client)[1]
            with self.subTest(start, lines=lines):
                self.assertRegex(lines[-1], rf"\A{start}")
                self.assertEqual(len(lines), 1 + start.startswith("secret"))

    def test_each_mistake_inside_a_frame_is_explained(self):
        mathserver.PAUSE = 0.05
        for act, start in INSIDE_A_FRAME:

            def client(sock, act=act):
                receive(sock, 3)
                act(sock)

            (line,) = self.converse(client)[1]
            self.assertRegex(line, rf"\Aquestion 1: {start}")

    def test_question_1_goes_byte_by_byte(self):
        self.converse(receive)
        self.assertEqual(len(self.served.sent), 9)

    def test_numbers_are_random_and_need_no_wrap(self):
        self.converse(lab4.answer_questions)
        questions = b"".join(self.served.sent)[:-9]
        for numbers in zip(*struct.iter_unpack(">xII", questions)):
            self.assertEqual(len(set(numbers)), len(numbers))
            self.assertLess(max(numbers), 2**31)

    def test_a_client_may_be_gone_before_it_is_accepted(self):
        with socket.socket() as sock:  # macOS may know no address then
            conversation = mathserver.Conversation((sock, None), PHRASE)
        self.assertEqual(conversation.name, "a client")

    def test_a_client_that_does_not_receive_until_9_bytes_gets_no_secret(self):
        def client(sock, receive_frame):
            frame = b""
            with contextlib.suppress(OSError):  # the server may close before an answer
                while (frame := receive_frame(sock))[:1] == b"Q":
                    sock.sendall(right(frame.ljust(9, b"\0")))
            return frame == b"S" + PHRASE.encode()

        self.use_real_times()
        mathserver.TRACEBACK = 0
        for name, receive_frame in WRONG_RECEIVERS.items():
            wrong = functools.partial(client, receive_frame=receive_frame)
            with self.subTest(name):
                # On a busy machine pieces may join, and one conversation be lucky.
                self.assertFalse(all(self.converse(wrong)[0] for _ in range(3)))

    @mock.patch("random.randint", min)
    def test_a_client_with_a_time_limit_of_a_second_gets_the_secret(self):
        def client(sock):
            sock.settimeout(1)
            return lab4.answer_questions(sock)

        self.use_real_times()
        self.assertEqual(self.converse(client)[0], PHRASE.encode())

    def test_the_pause_in_a_frame_follows_the_last_answer(self):
        def client(sock):
            question = receive(sock)
            time.sleep(0.2)
            send(sock, right(question))

        self.converse(client)
        self.assertEqual(self.thread.pause, mathserver.LONGEST_PAUSE)
        mathserver.LONGEST_PAUSE = 3
        self.converse(client)
        self.assertGreater(self.thread.pause, 0.3)

    @mock.patch("random.randint", min)
    def test_the_secret_comes_slowly(self):
        mathserver.SECRET_PAUSE = REAL_TIMES["SECRET_PAUSE"]
        self.converse(lab4.answer_questions)
        self.assertGreater(self.thread.pause, 0.1)

    def test_the_log_lets_a_client_print_its_error_first(self):
        self.use_real_times()
        start = time.monotonic()
        self.converse(lambda _: None)
        self.assertGreater(time.monotonic() - start, 0.25)


# Runs mathserver.py with other times, which are the first argument, as JSON.
SERVER = """
import json, sys
from tests import mathserver
vars(mathserver).update(json.loads(sys.argv.pop(1)))
mathserver.main()
"""
WAIT = (*PYTHON, "-c", "import sys; sys.stdin.readline()")  # a command to serve
LAB4 = (*PYTHON, "-c", "import lab4, sys; sys.argv.append(input()); lab4.main()")


class ServerTest(unittest.TestCase):
    maxDiff = None

    @contextlib.contextmanager
    def starting(self, *command, **times):
        """Start mathserver.py with other times; yield its process and its address."""
        changes = json.dumps({**TIMES, **times})
        line = (*PYTHON, "-c", SERVER, changes, "--port", 0, *command)
        with started(*line) as process:
            first = process.stderr.readline().decode()
            self.assertRegex(first, "^mathserver.py: listening on 127.0.0.1 port [1-9]")
            try:
                yield process, ("127.0.0.1", int(first.split()[-1]))
            except Exception as error:
                process.kill()
                raise AssertionError(f"the server left {finish(process)}") from error

    def serve(self, *command):
        """Serve a command that reads the port from stdin."""
        with self.starting(*command) as (process, address):
            return finish(process, f"{address[1]}\n")

    def run_server(self, *arguments):
        return run(*PYTHON, mathserver.__file__, *arguments)

    def test_it_serves_its_command(self):
        outcome = self.serve(*LAB4, "127.0.0.1")
        self.assertRegex(outcome.stdout, r"\A[!-~]{8}\n\Z", outcome)
        line = rf"\A.*: secret: {re.escape(outcome.stdout[:8])} for .*\n\Z"
        self.assertRegex(outcome.stderr, line)
        self.assertEqual(outcome.status, 0, outcome)

    def test_dashes_may_stand_before_the_command(self):
        outcome = self.serve("--", *WAIT)
        self.assertEqual(outcome.status, 0, outcome)

    def test_it_ends_with_the_status_of_its_command(self):
        for code, posix, windows in (
            ("sys.exit(3)", 3, 3),
            ("os.kill(os.getpid(), 15)", 143, 15),
            ("os._exit(-5)", 251, 255),
        ):
            outcome = self.serve(*PYTHON, "-c", f"import os, sys; {code}")
            status = posix if os.name == "posix" else windows
            self.assertEqual(outcome.status, status, outcome)

    def test_it_says_that_a_command_cannot_be_run(self):
        for command, advice in (
            ("nosuch", ""),
            ("nosuch.py", ""),
            ("tests/support.py", ": write python3 before it"),
        ):
            outcome = self.run_server("--port", 0, command)
            line = rf": cannot run '{command}': [^:\n]+{advice}\n"
            self.assertRegex(outcome.stderr, line)
            self.assertEqual(outcome.status, 127, outcome)

    def test_it_says_at_the_end_that_nobody_has_connected(self):
        with self.starting(*WAIT) as (process, (_, port)):
            line = rf"\A.*: nobody has connected to port {port} over TCP .*\n\Z"
            self.assertRegex(finish(process).stderr, line)

    def test_it_says_soon_that_nobody_has_connected(self):
        with self.starting(*WAIT, SILENCE=0.1) as (process, _):
            self.assertIn(b": nobody has connected ", process.stderr.readline())
            self.assertEqual(finish(process), Outcome("", "", 0))

    def test_in_a_terminal_of_its_own_it_waits_for_clients_in_silence(self):
        with self.starting(SILENCE=0) as (process, address):
            time.sleep(0.2)  # in which nothing should happen
            socket.create_connection(address).close()
            self.assertIn(b": question 1: ", process.stderr.readline())

    def test_it_tells_once_that_a_client_is_silent(self):
        with self.starting(SILENCE=0.05) as (process, address):
            with socket.create_connection(address, TIMEOUT) as sock:
                receive(sock)
                silent = process.stderr.readline()
                time.sleep(0.2)  # in which nothing should happen
            closed = process.stderr.readline()
        self.assertIn(b"question 1: the client has been silent for 0.05 s ", silent)
        self.assertIn(b"question 1: the client closed its side ", closed)

    @mock.patch("time.sleep")
    def test_it_says_when_files_or_threads_run_out_and_waits(self, sleep):
        def fail(conversation):
            conversation.sock.close()
            process.stdin.close()  # which ends the command
            raise error

        failing = mock.patch.object(mathserver.Conversation, "start", fail)
        for error in (OSError("no more files"), RuntimeError("no more threads")):
            with socket.create_server(("127.0.0.1", 0)) as server:
                socket.create_connection(server.getsockname()).close()
                with started(*WAIT) as process, failing, self.assertLogs() as log:
                    mathserver.serve(server, process)
            self.assertEqual(log.output, [f"ERROR:root:cannot serve a client: {error}"])
            self.assertGreater(sleep.call_args[0][0], 0)
            sleep.reset_mock()

    @POSIX
    def test_a_signal_ends_it_at_once(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        for number, command in itertools.product(signals, ((), WAIT)):
            with self.starting(*command) as (process, _):
                process.send_signal(number)
                self.assertEqual(finish(process), Outcome("", "", -number))

    def test_a_client_may_go_on_shortly_after_the_command(self):
        starting = self.starting(*WAIT)
        with starting as (process, address), socket.create_connection(address) as sock:
            process.stdin.close()
            time.sleep(0.2)  # in which the command ends
            self.assertTrue(lab4.answer_questions(sock))

    def test_stalled_clients_hold_up_neither_another_client_nor_the_end(self):
        starting = self.starting(*WAIT, GRACE=0)
        with starting as (process, address), contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(address))
            with socket.create_connection(address, TIMEOUT) as sock:
                self.assertTrue(lab4.answer_questions(sock))
            self.assertEqual(finish(process).status, 0)

    def test_its_port_is_taken_while_it_runs(self):
        with self.starting() as (_, (_, port)):
            outcome = self.run_server("--port", port)
            self.assertRegex(outcome.stderr, rf"\Amathserver.py: .*\b{port}\b.*\n\Z")
            self.assertEqual(outcome.status, 1, outcome)

    def test_its_options(self):
        for option, status, words in (
            ("--help", 0, "(default: 8000)"),
            ("--bind=a..b", 1, "mathserver.py: cannot listen on a..b: "),
            ("--port=-1", 2, "-1 is not from 0 to 65535"),
            ("--port=65536", 2, "65536 is not from 0 to 65535"),
        ):
            outcome = self.run_server(option)
            self.assertEqual(outcome.status, status, outcome)
            self.assertIn(words, outcome.stdout + outcome.stderr)
