"""Tests of mathserver.py: its conversations on real sockets, and the command."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import mathserver
from test_lab4 import has_ipv6, reset

SCRIPT = mathserver.__file__
LAB4 = str(Path(SCRIPT).resolve().parent.parent / "lab4.py")
TIMEOUT = 30  # seconds, for things that take a fraction of one
PHRASE = b"open it!"


class Client:
    """A client that reads whole frames from a math server."""

    def __init__(self, address: Any) -> None:
        self.sock = socket.create_connection(address[:2], TIMEOUT)
        self.stream = self.sock.makefile("rb")
        self.name = "{} port {}".format(*self.sock.getsockname())

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.sock.close()

    def question(self) -> Tuple[int, int]:
        """Return the operands of the next frame, a question."""
        tag, first, second = struct.unpack("!cII", self.stream.read(9))
        if tag != b"Q":
            raise AssertionError(f"{tag!r} is not the tag of a question")
        return first, second

    def answer(self) -> Tuple[int, int]:
        """Answer the next question right, and return its operands."""
        operands = self.question()
        self.sock.sendall(sum(operands).to_bytes(4, "big"))
        return operands

    def rest(self) -> bytes:
        """Return what comes until the server closes."""
        return self.stream.read()

    def reset(self) -> None:
        """Close the connection with a reset instead of an end of stream."""
        self.stream.close()
        reset(self.sock)


def whole_conversation(address: Any, questions: int) -> bytes:
    """Answer all questions right, and return what comes then."""
    with Client(address) as client:
        for _ in range(questions):
            client.answer()
        return client.rest()


def trusting_conversation(address: Any) -> bytes:
    """Return the phrase that a client gets which takes one recv for one frame."""
    with socket.create_connection(address, TIMEOUT) as sock:
        while True:
            frame = sock.recv(4096)
            if frame[:1] != b"Q":
                return frame[1:9]
            first = int.from_bytes(frame[1:5], "big")
            second = int.from_bytes(frame[5:9], "big")
            sock.sendall(((first + second) % 2**32).to_bytes(4, "big"))


class ConversationTest(unittest.TestCase):
    """Conversations with a MathServer in this process."""

    log: List[str]

    @contextlib.contextmanager
    def serving(
        self,
        questions: Optional[int] = 3,
        whole_frames: bool = True,
        host: str = "127.0.0.1",
    ) -> Iterator[Any]:
        """Yield the address of a server; when it has ended, self.log holds its log."""
        with self.assertLogs("mathserver") as logs:
            server = mathserver.MathServer(host, 0, PHRASE, questions, whole_frames)
            with server, server.serving():
                yield server.server_address
        listening, *self.log = [record.getMessage() for record in logs.records]
        where = "{} port {}".format(*server.server_address)
        self.assertEqual(listening, f"listening on {where}")

    def test_right_answers_get_the_secret(self) -> None:
        for questions in (0, 1, 20):
            with self.subTest(questions=questions):
                with self.serving(questions) as address, Client(address) as client:
                    for _ in range(questions):
                        client.answer()
                    self.assertEqual(client.rest(), b"S" + PHRASE)
                ending = f"{client.name}: right answers: {questions}, secret sent"
                self.assertEqual(self.log, [ending])

    def test_answers_may_come_byte_by_byte(self) -> None:
        with self.serving(1) as address, Client(address) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in sum(client.question()).to_bytes(4, "big"):
                client.sock.sendall(bytes([byte]))
            self.assertEqual(client.rest(), b"S" + PHRASE)

    def test_the_number_of_questions_is_random(self) -> None:
        with self.serving(None) as address:
            for _ in range(20):
                trusting_conversation(address)
        counts = {int(line.split()[-3].rstrip(",")) for line in self.log}
        self.assertGreater(len(counts), 1)
        self.assertGreaterEqual(min(counts), 1)

    def test_operands_are_random_over_31_bits(self) -> None:
        with self.serving(200) as address, Client(address) as client:
            operands = [operand for _ in range(200) for operand in client.answer()]
        self.assertLess(max(operands), 2**31)
        self.assertGreater(max(operands), 2**30)
        self.assertLess(min(operands), 2**29)
        self.assertGreater(len(set(operands)), 300)

    def test_a_wrong_bit_ends_the_conversation_and_is_explained(self) -> None:
        lines = []
        with self.serving() as address:
            for bit in range(32):
                with self.subTest(bit=bit), Client(address) as client:
                    client.answer()
                    first, second = client.question()
                    right = first + second
                    wrong = right ^ 1 << bit
                    client.sock.sendall(wrong.to_bytes(4, "big"))
                    self.assertEqual(client.rest(), b"")
                    wanted = f"{right} ({right.to_bytes(4, 'big').hex(' ')})"
                    came = f"{wrong} ({wrong.to_bytes(4, 'big').hex(' ')})"
                    fault = f"{first} + {second} is {wanted}, not {came}"
                    lines.append(f"{client.name}: question 2: {fault}")
        self.assertEqual(self.log, lines)

    def test_a_client_may_leave_between_answers(self) -> None:
        with self.serving() as address, Client(address) as client:
            client.answer()
            client.question()
        fault = "question 2: left without an answer"
        self.assertEqual(self.log, [f"{client.name}: {fault}"])

    def test_a_client_may_leave_inside_an_answer(self) -> None:
        for size in (1, 2, 3):
            with self.subTest(size=size):
                with self.serving() as address, Client(address) as client:
                    right = sum(client.question()).to_bytes(4, "big")
                    client.sock.sendall(right[:size])
                    client.sock.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest(), b"")
                fault = f"left after {size} of 4 answer bytes"
                self.assertEqual(self.log, [f"{client.name}: question 1: {fault}"])

    def test_a_client_may_reset_the_connection(self) -> None:
        with self.serving() as address, Client(address) as client:
            client.question()
            client.reset()
        fault = "question 1: connection lost: Connection reset by peer"
        self.assertEqual(self.log, [f"{client.name}: {fault}"])

    def test_a_silent_client_is_dropped(self) -> None:
        self.assertEqual(mathserver.Conversation.timeout, 60)
        soon = mock.patch.object(mathserver.Conversation, "timeout", 0.05)
        with soon, self.serving() as address, Client(address) as client:
            client.question()
            self.assertEqual(client.rest(), b"")
        fault = "question 1: silent for 0.05 seconds"
        self.assertEqual(self.log, [f"{client.name}: {fault}"])

    def test_one_recv_is_not_one_frame(self) -> None:
        with self.serving(None, whole_frames=False) as address:
            got_through = 0
            for _ in range(30):
                with contextlib.suppress(ConnectionError):
                    got_through += trusting_conversation(address) == PHRASE
        self.assertLessEqual(got_through, 3)
        self.assertEqual(len(self.log), 30)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[Tuple[Client, threading.Event]]:
        """Yield a client of a server whose pauses end when the event is set."""
        over = threading.Event()
        with mock.patch("mathserver.time.sleep") as sleep:
            sleep.side_effect = lambda _: over.wait(TIMEOUT)
            server = self.serving(0, whole_frames=False)
            with server as address, Client(address) as client:
                yield client, over
        self.assertEqual({pause.args for pause in sleep.mock_calls}, {(0.005,)})

    def test_the_pieces_of_a_frame_arrive_apart(self) -> None:
        with self.pausing() as (client, over):
            piece = client.sock.recv(9)
            client.sock.setblocking(False)
            with self.assertRaises(BlockingIOError):
                client.sock.recv(9)
            client.sock.settimeout(TIMEOUT)
            over.set()
            self.assertEqual(piece + client.rest(), b"S" + PHRASE)

    def test_a_client_may_reset_the_connection_inside_the_secret(self) -> None:
        with self.pausing() as (client, over):
            client.sock.recv(9)
            client.reset()
            over.set()
        (line,) = self.log
        start = f"{client.name}: secret: connection lost: "
        self.assertEqual(line[: len(start)], start)

    def test_no_piece_waits_for_another(self) -> None:
        server = mathserver.MathServer("127.0.0.1", 0, PHRASE)
        with server, server.serving(), Client(server.server_address) as client:
            client.question()
            (connection,) = server.connections
            nodelay = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            self.assertTrue(nodelay)

    def test_a_closed_server_lets_go_of_everything(self) -> None:
        server = mathserver.MathServer("127.0.0.1", 0, PHRASE, 1)
        with server, server.serving():
            whole_conversation(server.server_address, 1)
        self.assertEqual(server.connections, set())
        self.assertEqual(server.socket.fileno(), -1)

    def test_whole_frames_let_one_recv_be_one_frame(self) -> None:
        with self.serving() as address:
            self.assertEqual(trusting_conversation(address), PHRASE)

    def test_stalled_clients_keep_nobody_waiting(self) -> None:
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(self.serving(2))
            for _ in range(100):
                stack.enter_context(Client(address))
            with ThreadPoolExecutor(100) as pool:
                ends = pool.map(whole_conversation, [address] * 400, [2] * 400)
                self.assertEqual(set(ends), {b"S" + PHRASE})
        self.assertEqual(len(self.log), 500)

    @unittest.skipUnless(has_ipv6(), "this machine has no IPv6")
    def test_it_may_listen_on_ipv6(self) -> None:
        with self.serving(1, host="::1") as address, Client(address) as client:
            client.answer()
            self.assertEqual(client.rest(), b"S" + PHRASE)
        ending = "right answers: 1, secret sent"
        self.assertEqual(self.log, [f"{client.name}: {ending}"])


class CommandTest(unittest.TestCase):
    """The command, in a process of its own."""

    def start(self, *arguments: str) -> Any:
        """Start mathserver.py on a free port, which the tests' end kills."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--port", "0", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        return process

    def address(self, process: Any) -> Tuple[str, int]:
        """Return what the next line on stderr says is listened on."""
        line = process.stderr.readline().decode()
        match = re.fullmatch(r"mathserver.py: listening on (\S+) port (\d+)\n", line)
        self.assertIsNotNone(match, line)
        host, port = match.groups()  # type: ignore[union-attr]
        return host, int(port)

    def end(self, process: Any, given: bytes = b"") -> Tuple[bytes, str, int]:
        """Wait for the end; return stdout, the rest of stderr, and the status."""
        stdout, stderr = process.communicate(given, TIMEOUT)
        return stdout, stderr.decode(), process.returncode

    def test_one_line_shows_the_whole_lab(self) -> None:
        # The command gets to know the port from its standard input.
        script = 'read port && exec "$@" 127.0.0.1 "$port"'
        process = self.start("sh", "-c", script, "sh", sys.executable, LAB4)
        port = self.address(process)[1]
        stdout, stderr, status = self.end(process, b"%d\n" % port)
        self.assertRegex(stdout, rb"\A[!-~]{8}\n\Z")
        said = r"127\.0\.0\.1 port \d+: right answers: \d+, secret sent"
        self.assertRegex(stderr, rf"\Amathserver.py: {said}\n\Z")
        self.assertEqual(status, 0)

    def test_a_command_ends_the_server_and_gives_the_status(self) -> None:
        for script, status in (("true", 0), ("exit 3", 3), ("kill -TERM $$", 143)):
            for prefix in ((), ("--",)):
                with self.subTest(script=script, prefix=prefix):
                    process = self.start(*prefix, "sh", "-c", script)
                    self.address(process)
                    self.assertEqual(self.end(process), (b"", "", status))

    def test_a_command_may_have_options(self) -> None:
        process = self.start("--questions", "1", "echo", "--questions", "--help")
        self.assertEqual(self.end(process)[0], b"--questions --help\n")

    def test_a_command_may_end_while_a_client_is_stalled(self) -> None:
        process = self.start("--whole-frames", "sh", "-c", "read line; exit 4")
        with Client(self.address(process)) as client:
            client.question()
            stdout, stderr, status = self.end(process, b"\n")
            self.assertEqual(client.rest(), b"")
        line = f"mathserver.py: {client.name}: question 1: left without an answer\n"
        self.assertEqual((stdout, stderr, status), (b"", line, 4))

    def test_a_command_may_not_exist(self) -> None:
        cases = (
            ("./nosuch", "No such file or directory", 127),
            (SCRIPT + "/x", "Not a directory", 126),
            ("/", "Permission denied", 126),
        )
        for name, reason, status in cases:
            with self.subTest(name=name):
                line = f"mathserver.py: cannot run {name!r}: {reason}\n"
                self.assertEqual(self.end(self.start(name)), (b"", line, status))

    def test_a_signal_ends_it_at_once_and_quietly(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            for options in ((), ("sleep", "60")):
                with self.subTest(number=number, options=options):
                    process = self.start("--whole-frames", *options)
                    with Client(self.address(process)) as client:
                        client.question()
                        process.send_signal(number)
                        self.assertEqual(self.end(process), (b"", "", 128 + number))
                        self.assertEqual(client.rest(), b"")

    def test_the_port_can_be_had_again_immediately(self) -> None:
        process = self.start("--questions", "0")
        host, port = self.address(process)
        whole_conversation((host, port), 0)
        process.terminate()
        self.end(process)
        again = self.start("--port", str(port))
        self.assertEqual(self.address(again), (host, port))

    def test_an_address_may_not_be_had(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            cases = (
                ("127.0.0.1", port, "Address already in use"),
                ("203.0.113.1", 0, "Cannot assign requested address"),
                ("a..b", 0, "not a valid host name"),
            )
            for host, port, reason in cases:
                with self.subTest(host=host):
                    process = self.start("--bind", host, "--port", str(port))
                    where = f"{host} port {port}"
                    line = f"mathserver.py: cannot listen on {where}: {reason}\n"
                    self.assertEqual(self.end(process), (b"", line, 1))

    def test_whatever_a_client_does_is_one_line_of_the_log(self) -> None:
        def leave(client: Client) -> None:
            client.question()

        def reset_inside_an_answer(client: Client) -> None:
            client.question()
            client.sock.sendall(b"\0\0")
            client.reset()

        def send_garbage(client: Client) -> None:
            with contextlib.suppress(ConnectionError):
                client.sock.sendall(os.urandom(100000))

        process = self.start()
        address = self.address(process)
        for deed in (leave, Client.reset, reset_inside_an_answer, send_garbage):
            with self.subTest(deed.__name__):
                with Client(address) as client:
                    deed(client)
                line = process.stderr.readline().decode()
                start = f"mathserver.py: {client.name}: question 1: "
                self.assertEqual(line[: len(start)], start)
        process.terminate()
        self.assertEqual(self.end(process), (b"", "", 143))

    def test_the_secret_is_drawn_anew_at_each_start(self) -> None:
        secrets = []
        for _ in range(2):
            address = self.address(self.start("--questions", "0"))
            secrets.append(whole_conversation(address, 0))
            self.assertRegex(secrets[-1], rb"\AS[!-~]{8}\Z")
        self.assertNotEqual(*secrets)

    def test_the_secret_may_be_given_in_utf_8(self) -> None:
        options = ("--questions", "0", "--secret", "h\xe4sthus")
        address = self.address(self.start(*options))
        self.assertEqual(whole_conversation(address, 0), b"Sh\xc3\xa4sthus")

    def test_it_listens_on_port_8000_of_this_machine_alone_by_default(self) -> None:
        with mock.patch.object(sys, "argv", [SCRIPT]):
            arguments = mathserver.parse_arguments()
        self.assertEqual((arguments.bind, arguments.port), ("127.0.0.1", 8000))

    def test_a_wrong_option_is_a_usage_error(self) -> None:
        cases = (
            ("--port", "-1"),
            ("--port", "65536"),
            ("--port", "http"),
            ("--questions", "-1"),
            ("--questions", "few"),
            ("--secret", "7 bytes"),
            ("--secret", "9 bytes.."),
            ("--secret", "\xe4\xe4\xe4\xe4\xe4"),
            ("--secret", "1234567\udcff"),
        )
        for option, value in cases:
            with self.subTest(option=option, value=value):
                stdout, stderr, status = self.end(self.start(option, value))
                self.assertEqual((stdout, status), (b"", 2))
                fault = stderr.splitlines()[-1]
                start = f"mathserver.py: error: argument {option}: "
                self.assertEqual(fault[: len(start)], start)


if __name__ == "__main__":
    unittest.main()
