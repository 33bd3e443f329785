"""Tests of lab4.py: the protocol on real sockets, and the command as a user runs it."""

import contextlib
import errno
import itertools
import os
import re
import signal
import socket
import struct
import sys
import unittest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lab4
from tests import support
from tests.support import LAB4, POSIX, PYTHON, ROOT, TracedSocket, each, run

PHRASE = b"\x00\xff\r\n\x1b[2J"  # unfit for decoders and terminals
SECRET = b"S" + PHRASE
# Each integer is the same in both byte orders, which have a test of their own.
QUESTION, ANSWER = b"Q\x01\x02\x02\x01\x03\x05\x05\x03", b"\x04\x07\x07\x04"


class ProtocolTest(unittest.TestCase):
    def exchange(self, stream, stops=()):
        """Let a stream arrive and end; return the calls, the answers and the rest."""
        near, far = socket.socketpair()
        with near, TracedSocket(far, stops) as sock:
            near.sendall(stream)
            near.shutdown(socket.SHUT_WR)
            self.assertEqual(lab4.answer_questions(sock), PHRASE)
            calls, rest = sock.calls[:], sock.recv(4096)
            sock.shutdown(socket.SHUT_WR)
            with near.makefile("rb") as answers:
                return calls, answers.read(), rest

    def test_a_frame_may_arrive_in_any_pieces(self):
        for chosen in itertools.product((False, True), repeat=8):
            cuts = list(itertools.compress(range(1, 9), chosen))
            stops = cuts + [9 + cut for cut in cuts]
            calls, *seen = self.exchange(QUESTION + SECRET + b"Q and more", stops)
            recvs = ["recv"] * (1 + len(cuts))
            self.assertEqual(seen, [ANSWER, b"Q and more"], f"cut at {cuts}")
            self.assertEqual(calls, [*recvs, "sendall", *recvs], f"cut at {cuts}")

    def test_sums_are_big_endian_and_wrap_at_32_bits(self):
        edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 0x01020304)
        for pair in itertools.product(edges, repeat=2):
            _, answer, _ = self.exchange(struct.pack(">cII", b"Q", *pair) + SECRET)
            self.assertEqual(answer, struct.pack(">I", sum(pair) % 2**32), pair)

    def test_every_other_tag_is_refused(self):
        for tag in set(range(256)) - set(b"QS"):
            frame = bytes([tag]) + PHRASE
            with self.assertRaisesRegex(ValueError, re.escape(repr(frame))):
                self.exchange(frame)

    def test_the_stream_may_end_before_the_secret_is_complete(self):
        for frame, size in itertools.product((QUESTION, SECRET), range(9)):
            with self.assertRaisesRegex(EOFError, rf"\b{size} of .*\b9\b"):
                self.exchange(QUESTION + frame[:size])


def end(_, peer):
    peer.shutdown(socket.SHUT_WR)


def reset(_, peer):
    linger = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    peer.close()


def meet(stream, act=end, line=LAB4, host="127.0.0.1", **options):
    """Let a stream arrive in lab4.py, then act(process, peer); return how it ended.

    That is its stdout, stderr and status, and the server's address as it was given.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        address = (host, server.getsockname()[1])
        starting = support.started(*line, *address, **options)
        with starting as process, accept(server, process) as peer:
            peer.sendall(stream)
            act(process, peer)
            return (*support.finish(process), address)


def accept(server, process):
    """Return the connection that a process makes; raise AssertionError if it ends."""
    server.settimeout(0.1)
    while process.poll() is None:
        with contextlib.suppress(socket.timeout):
            return server.accept()[0]
    raise AssertionError(f"lab4.py does not connect: {process.stderr.read()!r}")


class ScriptTest(unittest.TestCase):
    def assert_fault(self, reason, outcome):
        """Check for one line on stderr, nothing on stdout, and status 1."""
        stdout, stderr, status, address = outcome
        self.assertEqual((stdout, status), (b"", 1), stderr)
        self.assertRegex(stderr, r"\Alab4\.py: .*\n\Z")
        self.assertTrue(stderr[:-1].isprintable(), stderr)
        if isinstance(reason, int):  # Windows has other words and numbers
            reason = os.strerror(reason) if os.name == "posix" else ""
        for words in (repr(address[0])[1:-1], f" port {address[1]}: ", f"{reason}\n"):
            self.assertIn(words, stderr)
        self.assertNotRegex(stderr, "Errno|None")

    def assert_phrase(self, *arguments, **options):
        outcome = meet(*arguments, **options)[:3]
        self.assertEqual(outcome, (PHRASE + b"\n", "", 0))

    def test_it_prints_the_phrase_byte_for_byte_in_any_locale(self):
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
        self.assert_phrase(QUESTION + SECRET)
        self.assert_phrase(QUESTION + SECRET, env={**os.environ, **ascii_only})

    def test_the_host_may_be_a_name_and_need_not_close_the_connection(self):
        self.assert_phrase(SECRET, lambda *_: None, host="localhost")

    def test_the_host_may_be_an_ipv6_address(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(f"this machine has no ::1: {error}")
        self.assert_phrase(SECRET, host="::1")

    def test_who_calls_main_may_go_on_writing_and_keeps_its_ctrl_c(self):
        code = "import lab4, signal; handler = signal.getsignal(signal.SIGINT); "
        code += "lab4.main(); print(signal.getsignal(signal.SIGINT) is handler)"
        stdout, *_ = meet(SECRET, line=(*PYTHON, "-c", code), cwd=ROOT)
        self.assertEqual(stdout, PHRASE + f"\nTrue{os.linesep}".encode())

    def test_it_has_help(self):
        stdout, stderr, status = run(*LAB4, "--help")
        self.assertEqual((stderr, status), ("", 0))
        for words in (b"usage: lab4.py [-h] host port", b"address", b"65535"):
            self.assertIn(words, stdout)

    @POSIX
    def test_it_is_executable(self):
        script = ROOT / "lab4.py"
        if not os.access(script, os.X_OK) or b"\r" in script.read_bytes():
            self.skipTest("no scripts run in this folder, or with Windows' line ends")
        self.assertIn(b"usage: lab4.py", run(script, "--help")[0])

    def test_wrong_arguments_are_a_usage_error(self):
        ports = ("http", "", "-1", "0", "65536", "8000.0")
        named: Any = {("h", port): "port" for port in ports}
        named.update({(): "host", ("h",): "port", ("h", "1", "more"): "more"})
        outcomes = each(lambda *words: run(*LAB4, *words), named)
        for words, (stdout, stderr, status) in outcomes.items():
            self.assertEqual((stdout, status), (b"", 2), words)
            fault = r"\Ausage: lab4\.py .*\nlab4\.py: error: .*\b"
            self.assertRegex(stderr, rf"{fault}{named[words]}\b", words)

    def test_nobody_may_be_there(self):
        invalid = "not a valid host name"
        reasons: Any = {("a..b", 8000): invalid, ("a" * 64, 8000): invalid}
        for host in ("", "nobody.invalid", "a\x1bb"):
            reasons[(host, 8000)] = ""  # the resolver's words, which differ
        for port in (1, 65535):
            reasons[("224.0.0.1", port)] = ""  # an address of many, not of one
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            reasons[taken.getsockname()] = errno.ECONNREFUSED
            outcomes = each(lambda *address: run(*LAB4, *address), reasons)
        for address, outcome in outcomes.items():
            self.assert_fault(reasons[address], (*outcome, address))

    def test_the_server_may_end_it_in_any_way(self):
        tag = b"q\x1b[2J\xff\n\a."
        self.assert_fault(repr(tag), meet(tag))
        self.assert_fault(" 5 of a frame's 9 bytes", meet(QUESTION[:5]))
        self.assert_fault(errno.ECONNRESET, meet(SECRET[:5], reset))

    def test_an_error_may_have_no_number(self):
        code = "import lab4, socket; socket.setdefaulttimeout(0.01); lab4.main()"
        outcome = meet(b"", lambda *_: None, (*PYTHON, "-c", code), cwd=ROOT)
        self.assert_fault("timed out", outcome)

    @POSIX
    def test_ctrl_c_ends_a_wait_without_a_word(self):
        for stream in (b"", QUESTION[:5], SECRET[:8]):
            *outcome, _ = meet(stream, lambda lab, _: lab.send_signal(signal.SIGINT))
            self.assertEqual(outcome, [b"", "", -signal.SIGINT])

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
    def test_stdout_may_be_a_full_device(self):
        with open("/dev/full", "wb") as full:
            self.assert_fault(errno.ENOSPC, meet(SECRET, stdout=full))

    @POSIX
    def test_stdout_may_be_a_pipe_without_a_reader(self):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            self.assert_fault(errno.EPIPE, meet(SECRET, stdout=pipe))

    @POSIX
    def test_stdout_may_be_closed(self):
        # The socket gets the number of stdout then, and must not get the phrase.
        closed = ("sh", "-c", 'exec "$@" >&-', "sh", *LAB4)
        self.assert_fault(errno.EBADF, meet(SECRET, line=closed))


if __name__ == "__main__":
    unittest.main()
