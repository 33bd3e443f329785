"""Tests of lab4.py: the protocol on real sockets, and the command as a user runs it."""

import contextlib
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Tuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mathserver import MathServer

import lab4

SCRIPT = lab4.__file__
TIMEOUT = 30  # seconds, for things that take a fraction of one
PHRASE = b"\x00\xff\r\n\x1b[2J"  # unfit for decoders and terminals
SECRET = b"S" + PHRASE
EDGES = (0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)
Case = TypeVar("Case")
Result = TypeVar("Result")


def question(first: int, second: int) -> bytes:
    return b"Q" + first.to_bytes(4, "big") + second.to_bytes(4, "big")


class TracedSocket(socket.socket):
    """A real socket that notes the calls on it; its recv ends where a piece ends."""

    def __init__(self, sock: socket.socket, pieces: Iterable[int] = ()) -> None:
        super().__init__(fileno=sock.detach())
        self.pieces = list(pieces)
        self.calls: List[Tuple[str, int]] = []

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.calls.append(("recv", size))
        if not self.pieces:
            return super().recv(size, flags)
        data = super().recv(min(size, self.pieces[0]), flags)
        self.pieces[0] -= len(data)
        if not self.pieces[0]:
            del self.pieces[0]
        return data

    def send(self, data: Any, flags: int = 0, /) -> int:
        self.calls.append(("send", len(data)))
        return super().send(data, flags)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self.calls.append(("send", len(data)))
        super().sendall(data, flags)


class Exchange(NamedTuple):
    phrase: bytes
    answers: bytes
    rest: bytes  # of the stream, left on the socket
    calls: List[Tuple[str, int]]


def exchange(stream: bytes, pieces: Iterable[int] = ()) -> Exchange:
    """Let the protocol run on a socket on which `stream` arrives in `pieces`."""
    near, far = socket.socketpair()
    with near, TracedSocket(far, pieces) as sock:
        near.sendall(stream)
        near.shutdown(socket.SHUT_WR)
        phrase = lab4.answer_questions(sock)
        calls = sock.calls[:]
        with sock.makefile("rb") as left:
            rest = left.read()
        sock.shutdown(socket.SHUT_WR)
        with near.makefile("rb") as sent:
            return Exchange(phrase, sent.read(), rest, calls)


class ProtocolTest(unittest.TestCase):
    """answer_questions on one end of a socket pair."""

    def test_a_frame_may_arrive_in_any_pieces(self) -> None:
        ways = 0
        for count in range(9):
            for cuts in itertools.combinations(range(1, 9), count):
                ends = (*cuts, 9)
                pieces = [end - start for start, end in zip((0, *cuts), ends)]
                with self.subTest(pieces=pieces):
                    seen = exchange(question(2**31, 77) + SECRET, pieces * 2)
                    self.assertEqual(seen.phrase, PHRASE)
                    self.assertEqual(seen.answers, (2**31 + 77).to_bytes(4, "big"))
                    asked = [size for call, size in seen.calls if call == "recv"]
                    missing = [9 - start for start in (0, *cuts)]
                    self.assertEqual(asked, missing * 2)
                ways += 1
        self.assertEqual(ways, 256)

    def test_a_whole_question_costs_one_recv_and_one_send(self) -> None:
        for count in (0, 1, 100):
            seen = exchange(question(1, 2) * count + SECRET)
            calls = [("recv", 9), ("send", 4)] * count + [("recv", 9)]
            self.assertEqual(seen.calls, calls)

    def test_what_follows_the_secret_stays_on_the_socket(self) -> None:
        seen = exchange(question(1, 2) + SECRET + b"Q and more")
        self.assertEqual(seen.rest, b"Q and more")

    def test_sums_are_big_endian_and_wrap_at_32_bits(self) -> None:
        pairs = list(itertools.product(EDGES, repeat=2))
        pairs += [(0x01020304, 0x10203040), (0xFFFFFFFF, 0x80000001)]
        seen = exchange(b"".join(question(*pair) for pair in pairs) + SECRET)
        for index, (first, second) in enumerate(pairs):
            with self.subTest(first=first, second=second):
                answer = seen.answers[4 * index : 4 * index + 4]
                right = (first + second) & 0xFFFFFFFF
                self.assertEqual(answer, right.to_bytes(4, "big"))
        self.assertEqual(len(seen.answers), 4 * len(pairs))

    def test_every_other_tag_is_refused(self) -> None:
        for tag in set(range(256)) - set(b"QS"):
            frame = bytes([tag]) + PHRASE
            with self.subTest(tag=tag), self.assertRaises(ValueError) as caught:
                exchange(frame)
            self.assertIn(repr(frame), str(caught.exception))


class Run(NamedTuple):
    stdout: bytes
    stderr: str
    status: int


def command(*arguments: object) -> List[str]:
    return [sys.executable, SCRIPT, *map(str, arguments)]


def run_command(line: List[str], **options: Any) -> Run:
    """Run a command line to its end."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False, **streams
    )
    return Run(done.stdout, done.stderr.decode(), done.returncode)


def run(*arguments: object, **options: Any) -> Run:
    """Run lab4.py with these arguments to its end."""
    return run_command(command(*arguments), **options)


@contextlib.contextmanager
def meeting(
    stdout: int = subprocess.PIPE,
) -> Iterator[Tuple["subprocess.Popen[bytes]", socket.socket]]:
    """Start lab4.py and yield it together with the server's end of its connection."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        process: Any = stack.enter_context(
            subprocess.Popen(
                command(*listener.getsockname()),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
            )
        )
        stack.callback(process.kill)
        # stderr is ready too when the process has ended, for then nobody will connect
        ready = select.select([listener, process.stderr], [], [], TIMEOUT)[0]
        if listener not in ready:
            raise AssertionError("lab4.py did not connect")
        peer = stack.enter_context(listener.accept()[0])
        peer.settimeout(TIMEOUT)
        yield process, peer


def finish(process: "subprocess.Popen[bytes]", port: int) -> Run:
    """Wait for the end of lab4.py, and write PORT for its server's port."""
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    said = stderr.decode().replace(f" port {port} ", " port PORT ")
    return Run(stdout, said, process.returncode)


def wait_until_blocked(process: "subprocess.Popen[bytes]") -> None:
    """Wait until lab4.py sleeps in a system call.

    Python heeds a signal between two of its instructions or by the end of a system call
    that it interrupts; one that comes right between those waits for the call's own end.
    """
    state = ""
    while state not in ("S", "Z"):
        os.sched_yield()
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        state = stat.rpartition(")")[2].split()[0]


def meet(serve: Callable[[socket.socket], None]) -> Run:
    """Run lab4.py against a server that does `serve` and then closes."""
    with meeting() as (process, peer):
        port = peer.getsockname()[1]
        serve(peer)
        peer.close()
        return finish(process, port)


def each(
    function: Callable[[Case], Result], cases: Iterable[Case]
) -> List[Tuple[Case, Result]]:
    """Return all cases with their results, had from some processes at a time."""
    cases = list(cases)
    with ThreadPoolExecutor(4) as pool:
        return list(zip(cases, pool.map(function, cases)))


def send(stream: bytes) -> Callable[[socket.socket], None]:
    return lambda peer: peer.sendall(stream)


def ask(peer: socket.socket) -> bytes:
    """Ask 1 + 2 and return the answer."""
    peer.sendall(question(1, 2))
    return peer.recv(4, socket.MSG_WAITALL)


def reset(peer: socket.socket) -> None:
    """Close the connection with a reset instead of an end of stream."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def setUpModule() -> None:
    # A shell has its background jobs ignore SIGINT, and lab4.py would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class CommandTest(unittest.TestCase):
    """The command, against servers that keep to the protocol."""

    def assert_prints(self, phrase: bytes, seen: Run) -> None:
        self.assertEqual(seen, Run(phrase + b"\n", "", 0))

    def assert_gets_the_phrase(self, host: str, **options: Any) -> None:
        with MathServer(host, 0, PHRASE, **options) as server, server.serving():
            self.assert_prints(PHRASE, run(host, server.server_address[1]))

    def test_it_gets_the_phrase_from_a_server_that_cuts_its_frames(self) -> None:
        self.assert_gets_the_phrase("127.0.0.1")

    def test_the_host_may_be_a_name(self) -> None:
        self.assert_gets_the_phrase("localhost", whole_frames=True)

    @unittest.skipUnless(has_ipv6(), "this machine has no IPv6")
    def test_the_host_may_be_an_ipv6_address(self) -> None:
        self.assert_gets_the_phrase("::1", whole_frames=True)

    def test_there_may_be_many_questions_or_none(self) -> None:
        self.assert_gets_the_phrase("127.0.0.1", questions=0)
        self.assert_gets_the_phrase("127.0.0.1", questions=3000, whole_frames=True)

    def test_the_script_is_executable(self) -> None:
        with MathServer("127.0.0.1", 0, PHRASE, 1) as server, server.serving():
            port = str(server.server_address[1])
            self.assert_prints(PHRASE, run_command([SCRIPT, "127.0.0.1", port]))

    def test_the_phrase_is_printed_byte_for_byte_in_any_locale(self) -> None:
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for phrase in (PHRASE, b"\xff" * 8, b"\0" * 8, b"\n" * 8, b"        "):
            with MathServer("127.0.0.1", 0, phrase, 0) as server, server.serving():
                port = server.server_address[1]
                seen = run("127.0.0.1", port, env={**os.environ, **locale})
            with self.subTest(phrase=phrase):
                self.assert_prints(phrase, seen)

    def test_it_does_not_wait_for_the_server_to_close(self) -> None:
        with meeting() as (process, peer):
            self.assertEqual(ask(peer), b"\0\0\0\3")
            peer.sendall(SECRET)
            self.assert_prints(PHRASE, finish(process, 0))
            self.assertEqual(peer.recv(1), b"")

    def test_the_connection_is_closed_before_the_phrase_is_written(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        filler = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filler += os.write(writer, b".")
        os.set_blocking(writer, True)
        with open(reader, "rb") as pipe, meeting(stdout=writer) as (process, peer):
            os.close(writer)
            peer.sendall(SECRET)
            self.assertEqual(peer.recv(1), b"")
            self.assertIsNone(process.poll())
            self.assertEqual(pipe.read(), b"." * filler + PHRASE + b"\n")
            self.assertEqual(finish(process, 0).status, 0)

    def test_help_names_the_arguments(self) -> None:
        seen = run("--help")
        self.assertEqual((seen.stderr, seen.status), ("", 0))
        self.assertIn(b"usage: lab4.py [-h] host port\n", seen.stdout)
        for word in (b"secret phrase", b"name or address", b"1 to 65535"):
            self.assertIn(word, b" ".join(seen.stdout.split()))


class FaultTest(unittest.TestCase):
    """The command, when something goes wrong."""

    def assert_fault(self, seen: Run, fault: str) -> None:
        self.assertEqual(seen, Run(b"", f"lab4.py: {fault}\n", 1))

    def assert_connection_fault(self, seen: Run, reason: str) -> None:
        self.assert_fault(seen, f"talking to '127.0.0.1' port PORT failed: {reason}")

    def assert_usage_error(self, seen: Run, fault: str) -> None:
        usage = "usage: lab4.py [-h] host port\n"
        self.assertEqual(seen, Run(b"", f"{usage}lab4.py: error: {fault}\n", 2))

    def test_there_are_two_arguments(self) -> None:
        required = "the following arguments are required: "
        self.assert_usage_error(run(), required + "host, port")
        self.assert_usage_error(run("localhost"), required + "port")
        extra = run("localhost", 8000, "more")
        self.assert_usage_error(extra, "unrecognized arguments: more")

    def test_a_port_is_a_whole_number_from_1_to_65535(self) -> None:
        ports = ["http", "", "-1", "0", "65536", "70000", "8000.0", "0x1f40", 2**70]
        for port, seen in each(lambda port: run("localhost", port), map(str, ports)):
            with self.subTest(port=port):
                fault = f"{port!r} is not a whole number, 1 to 65535"
                self.assert_usage_error(seen, f"argument port: {fault}")

    def test_the_lowest_and_the_highest_port_are_ports(self) -> None:
        for port in (1, 65535):
            with self.subTest(port=port):
                fault = f"talking to 'a..b' port {port} failed: not a valid host name"
                self.assert_fault(run("a..b", port), fault)

    def test_a_host_name_may_be_no_host_name(self) -> None:
        for host in ("a..b", ".", "a" * 64, f"www.{'b' * 64}.example"):
            with self.subTest(host=host):
                fault = f"talking to '{host}' port 8000 failed: not a valid host name"
                self.assert_fault(run(host, 8000), fault)

    def test_a_host_name_may_be_unknown(self) -> None:
        quick = {**os.environ, "RES_OPTIONS": "attempts:1 timeout:1"}
        for host in ("", "a b", "nosuch.invalid", "ñandú.invalid"):
            with self.subTest(host=host):
                seen = run(host, 8000, env=quick)
                line = f"lab4.py: talking to '{host}' port 8000 failed: [A-Z][a-z ]+\n"
                self.assertRegex(seen.stderr, f"^{line}$")
                self.assertEqual((seen.stdout, seen.status), (b"", 1))

    def refused(self, host: str, family: socket.AddressFamily) -> None:
        with socket.socket(family) as taken:
            taken.bind((host, 0))  # and not listening
            port = taken.getsockname()[1]
            fault = f"talking to '{host}' port {port} failed: Connection refused"
            self.assert_fault(run(host, port), fault)

    def unreachable(self, multicast: str) -> None:
        # Nobody can be connected to at a multicast address, with or without a network.
        fault = f"talking to '{multicast}' port 8000 failed: Network is unreachable"
        self.assert_fault(run(multicast, 8000), fault)

    def test_nobody_may_be_there(self) -> None:
        self.refused("127.0.0.1", socket.AF_INET)
        self.unreachable("224.0.0.1")

    @unittest.skipUnless(has_ipv6(), "this machine has no IPv6")
    def test_nobody_may_be_there_on_ipv6(self) -> None:
        self.refused("::1", socket.AF_INET6)
        self.unreachable("ff02::1")

    def test_the_server_may_close_before_the_secret_is_complete(self) -> None:
        for frame in (question(1, 2), SECRET):
            starts = [frame[:size] for size in range(9)]
            for start, seen in each(lambda start: meet(send(start)), starts):
                with self.subTest(start=start):
                    self.assert_connection_fault(
                        seen,
                        "it closed before the secret phrase came, "
                        f"after {len(start)} of the 9 bytes of a frame",
                    )

    def test_the_server_may_close_after_right_answers(self) -> None:
        for answers in (1, 2, 5):

            def serve(peer: socket.socket, answers: int = answers) -> None:
                for _ in range(answers):
                    self.assertEqual(ask(peer), b"\0\0\0\3")

            with self.subTest(answers=answers):
                self.assert_connection_fault(
                    meet(serve),
                    "it closed before the secret phrase came, "
                    "after 0 of the 9 bytes of a frame",
                )

    def test_the_server_may_reset_the_connection(self) -> None:
        def inside_a_frame(peer: socket.socket) -> None:
            peer.sendall(question(1, 2)[:5])
            reset(peer)

        def with_the_answer_unread(peer: socket.socket) -> None:
            peer.sendall(question(1, 2))
            peer.recv(4, socket.MSG_WAITALL | socket.MSG_PEEK)
            peer.close()

        for serve in (reset, inside_a_frame, with_the_answer_unread):
            with self.subTest(serve.__name__):
                self.assert_connection_fault(meet(serve), "Connection reset by peer")

    def test_a_frame_may_be_no_frame_of_a_math_server(self) -> None:
        streams = [
            b"\0" * 9,
            b"\xff" * 9,
            b"\x1b[2J\a\r\n\x9b\x7f",
            b"q" + PHRASE,
            b"s" + PHRASE,
            b"+OK POP3 server ready\r\n",
            b"220 mail.example ESMTP\r\n",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
        ]
        for stream, seen in each(lambda stream: meet(send(stream)), streams):
            with self.subTest(stream=stream):
                fault = f"neither a question nor the secret: {stream[:9]!r}"
                self.assert_connection_fault(seen, fault)
                self.assertTrue(seen.stderr.rstrip("\n").isprintable())

    def test_ctrl_c_ends_a_wait_without_a_word(self) -> None:
        for start in (b"", question(1, 2)[:5], SECRET[:8]):
            with self.subTest(start=start), meeting() as (process, peer):
                peer.sendall(start)
                wait_until_blocked(process)
                process.send_signal(signal.SIGINT)
                self.assertEqual(finish(process, 0), Run(b"", "", 130))

    def assert_stdout_fault(self, reason: str, **options: Any) -> None:
        with MathServer("127.0.0.1", 0, PHRASE, 0) as server, server.serving():
            seen = run("127.0.0.1", server.server_address[1], **options)
        fault = f"lab4.py: writing to standard output failed: {reason}\n"
        self.assertEqual((seen.stderr, seen.status), (fault, 1))

    def test_stdout_may_be_a_full_device(self) -> None:
        with open("/dev/full", "wb") as full:
            self.assert_stdout_fault("No space left on device", stdout=full)

    def test_stdout_may_be_a_pipe_without_a_reader(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            self.assert_stdout_fault("Broken pipe", stdout=pipe)

    def test_stdout_may_be_closed(self) -> None:
        with MathServer("127.0.0.1", 0, PHRASE, 0) as server, server.serving():
            line = command("127.0.0.1", server.server_address[1])
            seen = run_command(["sh", "-c", 'exec "$@" >&-', "sh", *line])
        fault = "writing to standard output failed: Bad file descriptor"
        self.assert_fault(seen, fault)


if __name__ == "__main__":
    unittest.main()
