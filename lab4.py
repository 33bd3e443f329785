#!/usr/bin/env python3
"""Answer a math server's addition questions over TCP and print its secret phrase."""

import argparse
import signal
import socket
import struct
import sys

FRAME_SIZE = 9  # from the server: a tag of 1 byte and a payload of 8
QUESTION, SECRET = b"Q", b"S"  # the tags
OPERANDS = struct.Struct("!II")  # a question's; "!" is big-endian, "I" unsigned 32 bits
ANSWER = struct.Struct("!I")  # to the server: the sum


def receive_frame(sock: socket.socket) -> bytes:
    """Return the next 9 bytes on `sock`, one frame, in however many pieces they come.

    Raise EOFError if the stream ends first, and OSError if the connection fails.
    """
    frame = b""
    while len(frame) < FRAME_SIZE:
        piece = sock.recv(FRAME_SIZE - len(frame))  # not into the next frame
        if not piece:  # b"": the peer has closed; unchecked, this would spin for ever
            raise EOFError(f"closed after {len(frame)} of a frame's {FRAME_SIZE} bytes")
        frame += piece
    return frame


def answer_questions(sock: socket.socket) -> bytes:
    """Answer each question that arrives on `sock`; return the secret phrase, 8 bytes.

    Raise ValueError for a frame with an unknown tag, and whatever receive_frame raises.
    """
    while True:
        frame = receive_frame(sock)
        if frame.startswith(QUESTION):  # frame[0] would be a number: 81, not b"Q"
            first, second = OPERANDS.unpack(frame[1:])
            sock.sendall(ANSWER.pack((first + second) % 2**32))  # to fit in 4 bytes
        elif frame.startswith(SECRET):
            return frame[1:]
        else:
            raise ValueError(f"neither a question nor the secret: {frame!r}")


def main() -> None:
    """Print the secret phrase of the server named in argv, or exit and say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="host name or address of the math server")
    parser.add_argument("port", type=int, help="its TCP port, 1 to 65535")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:  # else 70000 may reach port 4464, 70000 - 65536
        parser.error(f"argument port: {args.port} is not from 1 to 65535")
    failure = f"lab4.py: cannot print the phrase from {args.host!r} port {args.port}"
    try:
        with socket.create_connection((args.host, args.port)) as sock:  # IPv4 or IPv6
            phrase = answer_questions(sock)
        with open(1, "wb", closefd=False) as stdout:  # raw bytes; print is for text
            stdout.write(phrase + b"\n")
    except OSError as error:
        sys.exit(f"{failure}: {error.strerror or error}")  # without "[Errno 111]"
    except UnicodeError:  # a host like "a..b"; it is a ValueError, so it stands above
        sys.exit(f"{failure}: not a valid host name")
    except (EOFError, ValueError) as error:
        sys.exit(f"{failure}: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
