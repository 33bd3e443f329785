"""Tests of lab4.py: the protocol, the command, and as a part of another program."""

import contextlib
import errno
import itertools
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import lab4
from tests import support
from tests.support import IPV6, LAB4, POSIX, PYTHON, ROOT, RecordedSocket, run

PHRASE = b" \x00\xff\xc3\xa9\x1b[\n"  # not UTF-8, and with white space at both ends
SECRET = b"S" + PHRASE
# Each integer is the same in both byte orders: only one test is about the order.
QUESTION, ANSWER = b"Q\x01\x02\x02\x01\x03\x05\x05\x03", b"\x04\x07\x07\x04"


class ProtocolTest(unittest.TestCase):
    def exchange(self, stream, stops=()):
        """Let a stream arrive and end; return what is received, sent and left over."""
        near, far = socket.socketpair()
        with near, RecordedSocket(far, stops) as sock:
            near.sendall(stream)
            near.shutdown(socket.SHUT_WR)
            self.assertEqual(lab4.answer_questions(sock), PHRASE)
            self.assertEqual(sock.gettimeout(), socket.getdefaulttimeout())
            return sock.received[:], sock.sent, sock.recv(4096)

    def test_a_frame_may_arrive_in_any_pieces(self):
        for chosen in itertools.product((False, True), repeat=8):
            cuts = list(itertools.compress(range(1, 9), chosen))
            stops = cuts + [9 + cut for cut in cuts]
            seen = self.exchange(QUESTION + SECRET + b"Q and more", stops)
            ends = list(zip([0, *cuts], [*cuts, 9]))
            pieces = [frame[i:j] for frame in (QUESTION, SECRET) for i, j in ends]
            self.assertEqual(seen, (pieces, [ANSWER], b"Q and more"))

    def test_sums_are_big_endian_and_wrap_at_32_bits(self):
        edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 0x01020304)
        for pair in itertools.product(edges, repeat=2):
            _, sent, _ = self.exchange(struct.pack(">cII", b"Q", *pair) + SECRET)
            self.assertEqual(sent, [struct.pack(">I", sum(pair) % 2**32)], pair)

    def test_every_other_tag_is_refused(self):
        for tag in set(range(256)) - set(b"QS"):
            frame = bytes([tag]) + PHRASE
            with self.assertRaisesRegex(ValueError, re.escape(repr(frame))):
                self.exchange(frame)

    def test_the_stream_may_end_before_the_secret_is_complete(self):
        for frame, size in itertools.product((QUESTION, SECRET), range(9)):
            with self.assertRaisesRegex(EOFError, rf"\b{size} of .*\b9\b"):
                self.exchange(QUESTION + frame[:size])


def reset(_, peer):
    peer.setsockopt(*support.RESET)
    peer.close()


def meet(stream, act=lambda *_: None, line=LAB4, host="127.0.0.1", **options):
    """Send lab4.py a stream and act; return stdout, stderr, status and the address."""
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
    ended = None
    while ended is None:
        ended = process.poll()  # asked first, since it may connect and end at once
        with contextlib.suppress(socket.timeout):
            return server.accept()[0]
    raise AssertionError(f"lab4.py does not connect: {process.stderr.read()!r}")


class ScriptTest(unittest.TestCase):
    def assert_fault(self, reason, outcome):
        """Check for one line on stderr, nothing on stdout, and status 1."""
        stdout, stderr, status, (host, port) = outcome
        self.assertEqual((stdout, status), (b"", 1), stderr)
        if isinstance(reason, int):  # Windows has other words and numbers
            reason = os.strerror(reason) if os.name == "posix" else ""
        where, why = re.escape(f"{host!r} port {port}: "), re.escape(reason)
        self.assertRegex(stderr, rf"\Alab4\.py: .* {where}.*{why}\n\Z")
        self.assertTrue(stderr[:-1].isprintable(), stderr)
        self.assertNotRegex(stderr, "Errno|None")

    def assert_phrase(self, *arguments, **options):
        self.assertEqual(meet(*arguments, **options)[:3], (PHRASE + b"\n", "", 0))

    def test_it_prints_the_phrase_byte_for_byte_in_any_locale(self):
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
        self.assert_phrase(QUESTION + SECRET)
        self.assert_phrase(QUESTION + SECRET, env={**support.ENVIRONMENT, **ascii_only})

    def test_the_host_may_be_a_name(self):
        self.assert_phrase(SECRET, host="localhost")

    @IPV6
    def test_the_host_may_be_an_ipv6_address(self):
        self.assert_phrase(SECRET, host="::1")

    def test_it_has_help(self):
        stdout, stderr, status = run(*LAB4, "--help")
        self.assertEqual((stderr, status), ("", 0))
        for words in (b"lab4.py [-h] host port", b"phrase", b"address", b"65535"):
            self.assertIn(words, stdout)

    @POSIX
    def test_it_is_executable(self):
        script = ROOT / "lab4.py"
        if not os.access(script, os.X_OK) or b"\r" in script.read_bytes():
            self.skipTest("no scripts run in this folder, or with Windows' line ends")
        self.assertIn(b"usage: lab4.py", run(script, "--help")[0])

    def test_wrong_arguments_are_a_usage_error(self):
        lines = ("h", "h http", "h 8000.0", "h -1", "h 0", "h 65536")
        named = {**dict.fromkeys(lines, "port"), "": "host", "h 1 more": "more"}
        for line, name in named.items():
            stdout, stderr, status = run(*LAB4, *line.split())
            self.assertEqual((stdout, status), (b"", 2), line)
            fault = rf"\Ausage: lab4\.py .*\nlab4\.py: error: .*\b{name}\b"
            self.assertRegex(stderr, fault, line)

    def test_a_host_that_cannot_be_reached_or_is_too_slow_is_a_fault(self):
        code = "import lab4, socket; socket.setdefaulttimeout(0.01); lab4.main()"
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))  # and does not listen
            address = server.getsockname()
            self.assert_fault(errno.ECONNREFUSED, (*run(*LAB4, *address), address))
            server.listen()  # and says nothing
            outcome = run(*PYTHON, "-c", code, *address)
            self.assert_fault("timed out", (*outcome, address))  # which has no errno
        multicast = "224.0.0.1"  # for which there is no TCP
        for address in (("a..b", 1), ("a\x1bb", 1), (multicast, 1), (multicast, 65535)):
            self.assert_fault("", (*run(*LAB4, *address), address))  # words differ

    def test_a_wrong_tag_an_early_end_and_a_reset_are_faults(self):
        tag = b"q\x1b[2J\xff\n\a."
        self.assert_fault(repr(tag), meet(tag))
        outcome = meet(QUESTION[:5], lambda _, peer: peer.shutdown(socket.SHUT_WR))
        self.assert_fault(" 5 of a frame's 9 bytes", outcome)
        self.assert_fault(errno.ECONNRESET, meet(SECRET[:5], reset))

    def test_it_has_no_time_limit(self):
        change = "lab4.answer_questions = lambda sock: b'%a' % sock.gettimeout()"
        line = (*PYTHON, "-c", f"import lab4; {change}; lab4.main()")
        self.assertEqual(meet(b"", line=line)[0], b"None\n")

    @POSIX
    def test_ctrl_c_ends_a_wait_without_a_word(self):
        for stream in (b"", QUESTION[:5], SECRET[:8]):
            *outcome, _ = meet(stream, lambda lab, _: lab.send_signal(signal.SIGINT))
            self.assertEqual(outcome, [b"", "", -signal.SIGINT])

    @POSIX
    def test_stdout_may_be_a_file_with_room_for_four_bytes(self):
        limit = "import resource as r, lab4; r.setrlimit(r.RLIMIT_FSIZE, (4, 4))"
        line = (*PYTHON, "-c", f"{limit}; lab4.main()")
        with tempfile.TemporaryFile() as file:
            self.assert_fault(errno.EFBIG, meet(SECRET, line=line, stdout=file))

    @POSIX
    def test_stdout_may_be_a_pipe_without_a_reader(self):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            self.assert_fault(errno.EPIPE, meet(SECRET, stdout=pipe))

    @POSIX
    def test_stdout_may_be_closed(self):
        # Then the socket gets the number of stdout, but must not get the phrase.
        closed = ("sh", "-c", 'exec "$@" >&-', "sh", *LAB4)
        self.assert_fault(errno.EBADF, meet(SECRET, line=closed))


# A program that runs lab4.py inside itself, by a statement that is filled in.
HOST = """
import contextlib, io, lab4, runpy, signal, sys, threading
run = lambda: runpy.run_path("lab4.py", run_name="__main__")
handler = signal.getsignal(signal.SIGINT)
stdout = io.StringIO()
{}
print(ascii(stdout.getvalue()), signal.getsignal(signal.SIGINT) is handler)
"""


class HostTest(unittest.TestCase):
    def assert_output(self, expected, statement):
        outcome = meet(SECRET, line=(*PYTHON, "-c", HOST.format(statement)))[:3]
        self.assertEqual(outcome, (expected + os.linesep.encode(), "", 0), statement)

    def test_a_stdout_that_the_host_has_replaced_gets_the_phrase_as_text(self):
        in_thread = "t = threading.Thread(target=run); t.start(); t.join()"
        for call in ("run()", "lab4.main()", in_thread):
            statement = f"with contextlib.redirect_stdout(stdout): {call}"
            self.assert_output(rb"' \x00\\xff\\xc3\\xa9\x1b[\n\n' True", statement)

    def test_a_host_may_write_before_and_after_and_keeps_its_ctrl_c(self):
        expected = b"before" + os.linesep.encode() + PHRASE + b"\n'' True"
        for call in ("lab4.main()", "sys.ps1 = '>>> '; run()"):
            self.assert_output(expected, f"print('before'); {call}")


if __name__ == "__main__":
    unittest.main()
