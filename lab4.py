#!/usr/bin/env python3
"""Answer a math server's addition questions over TCP and print its secret phrase."""

import argparse
import signal
import socket
import struct
import sys

# The wire format: "!" is big-endian, "I" an unsigned 32-bit integer.
FRAME_SIZE = 9  # from the server: a tag of 1 byte and a payload of 8
QUESTION, SECRET = b"Q", b"S"  # the tags
OPERANDS = struct.Struct("!II")  # the payload of a question
ANSWER = struct.Struct("!I")  # to the server: the sum


def main() -> None:
    """Print the secret phrase of the server named in argv, or exit with one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends any wait at once
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="host name or address of the math server")
    parser.add_argument("port", type=int, help="its TCP port, 1 to 65535")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:  # the resolver takes 70000 for 4464
        parser.error(f"argument port: {args.port} is not from 1 to 65535")
    failure = f"lab4.py: cannot print the phrase from {args.host!r} port {args.port}"
    try:
        # Plain connect tries one IPv4 address; this tries all of the host's, IPv6 too.
        with socket.create_connection((args.host, args.port)) as sock:
            phrase = answer_questions(sock)
        with open(1, "wb") as stdout:  # descriptor 1 is stdout; print is for text
            stdout.write(phrase + b"\n")
    except UnicodeError:  # must stand above ValueError, its base class
        sys.exit(f"{failure}: not a valid host name")
    except (EOFError, OSError, ValueError) as error:  # strerror: without [Errno 111]
        sys.exit(f"{failure}: {getattr(error, 'strerror', error)}")


def answer_questions(sock: socket.socket) -> bytes:
    """Answer each question that arrives on `sock`; return the secret phrase, 8 bytes.

    Raise ValueError for a frame with an unknown tag, and whatever receive_frame raises.
    """
    while True:
        frame = receive_frame(sock)
        tag, payload = frame[:1], frame[1:]
        if tag == SECRET:
            return payload
        if tag != QUESTION:
            raise ValueError(f"neither a question nor the secret: {frame!r}")
        first, second = OPERANDS.unpack(payload)
        sock.sendall(ANSWER.pack((first + second) % 2**32))  # to fit in 4 bytes


def receive_frame(sock: socket.socket) -> bytes:
    """Return the next 9 bytes on `sock`, one frame, in however many pieces they come.

    Raise EOFError if the stream ends first, and OSError if the connection fails.
    """
    frame = b""
    while len(frame) < FRAME_SIZE:
        piece = sock.recv(FRAME_SIZE - len(frame))  # not into the next frame
        if not piece:  # no bytes: the stream has ended
            raise EOFError(f"closed after {len(frame)} of a frame's {FRAME_SIZE} bytes")
        frame += piece
    return frame


if __name__ == "__main__":
    main()
