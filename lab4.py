#!/usr/bin/env python3
"""Answer a math server's addition questions over TCP and print its secret phrase."""

import argparse
import os
import socket
import struct
import sys
from typing import Tuple

# The wire format; its integers are unsigned 32-bit and big-endian.
FRAME = struct.Struct("c8s")  # from the server: a tag and a payload
OPERANDS = struct.Struct("!II")  # the payload of a question
ANSWER = struct.Struct("!I")  # to the server: the sum
QUESTION, SECRET = b"Q", b"S"  # the tags


def main() -> None:
    """Print the secret phrase of the server named in argv, or exit with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="host name or address of the math server")
    parser.add_argument("port", help="its TCP port, 1 to 65535", type=port_number)
    arguments = parser.parse_args()
    doing = "writing to standard output"
    try:
        # Its own file, since sys.stdout may hide a failed write until the exit; opened
        # first, since a socket would get the number of a closed standard output.
        with open(os.dup(1), "wb") as stdout:
            doing = f"talking to {arguments.host!r} port {arguments.port}"
            with socket.create_connection((arguments.host, arguments.port)) as sock:
                phrase = answer_questions(sock)
            doing = "writing to standard output"
            stdout.write(phrase + b"\n")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        reason = error.strerror
    except UnicodeError:  # a host name goes through the codec "idna" first
        reason = "not a valid host name"
    except (EOFError, ValueError) as error:
        reason = str(error)
    else:
        return
    sys.exit(f"lab4.py: {doing} failed: {reason}")


def port_number(text: str) -> int:
    """Return the TCP port, 1 to 65535, that `text` spells in decimal digits.

    Raise argparse.ArgumentTypeError for any other text.
    """
    if text not in map(str, range(1, 65536)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 to 65535")
    return int(text)


def answer_questions(sock: socket.socket) -> bytes:
    """Answer each question that arrives on `sock`; return the secret phrase, 8 bytes.

    Raise ValueError for a frame with an unknown tag, and whatever receive_frame raises.
    """
    while True:
        tag, payload = receive_frame(sock)
        if tag == SECRET:
            return payload
        if tag != QUESTION:
            raise ValueError(f"neither a question nor the secret: {tag + payload!r}")
        first, second = OPERANDS.unpack(payload)
        sock.sendall(ANSWER.pack((first + second) % 2**32))


def receive_frame(sock: socket.socket) -> Tuple[bytes, bytes]:
    """Return the tag (1 byte) and payload (8 bytes) of the next frame on `sock`.

    Take nothing beyond the frame from the stream, in however many pieces it arrives.
    Raise EOFError if the stream ends first, and OSError if the connection fails.
    """
    frame = b""
    while len(frame) < FRAME.size:
        piece = sock.recv(FRAME.size - len(frame))
        if not piece:
            count = f"{len(frame)} of the {FRAME.size} bytes of a frame"
            raise EOFError(f"it closed before the secret phrase came, after {count}")
        frame += piece
    return FRAME.unpack(frame)


if __name__ == "__main__":
    main()
