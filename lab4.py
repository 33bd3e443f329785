#!/usr/bin/env python3
"""Answer a math server's addition questions over TCP and print its secret phrase."""

import argparse
import socket
import struct
import sys

FRAME_SIZE = 9  # what the server sends: a tag of 1 byte, then a payload of 8
QUESTION = b"Q"
SECRET = b"S"
OPERANDS = struct.Struct(">II")  # ">" is big-endian, "I" an unsigned 32-bit integer
ANSWER = struct.Struct(">I")  # the client sends these 4 bytes, without a tag


def receive_frame(sock: socket.socket) -> bytes:
    """Return the next frame from `sock`: all 9 bytes, even if they come in pieces.

    Raise EOFError if the stream ends first, and OSError if the connection fails.
    """
    frame = b""
    while len(frame) < FRAME_SIZE:
        piece = sock.recv(FRAME_SIZE - len(frame))  # never into the next frame
        if not piece:  # recv returns b"" once the server has closed the connection
            raise EOFError(f"the stream ended after {len(frame)} of {FRAME_SIZE} bytes")
        frame += piece
    return frame


def answer_questions(sock: socket.socket) -> bytes:
    """Answer each question that arrives on `sock`; return the secret phrase, 8 bytes.

    Raise ValueError for a frame with an unknown tag, and whatever receive_frame raises.
    """
    while True:
        frame = receive_frame(sock)
        tag = frame[:1]  # frame[0] would be an int, never equal to b"S"
        payload = frame[1:]
        if tag == SECRET:
            return payload
        if tag != QUESTION:
            raise ValueError(f"neither a question nor the secret: {frame!r}")
        first, second = OPERANDS.unpack(payload)
        total = (first + second) % 2**32  # keep 32 bits: a sum may have 33
        sock.sendall(ANSWER.pack(total))


def main() -> None:
    """Print the phrase of the server that the arguments name, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="host name or address of the math server")
    parser.add_argument("port", type=int, help="its TCP port, 1 to 65535")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:  # otherwise 65537 might mean port 1
        parser.error(f"argument port: {args.port} is not from 1 to 65535")
    try:
        with socket.create_connection((args.host, args.port)) as sock:
            phrase = answer_questions(sock)
        text = phrase.decode("utf-8", "backslashreplace")  # \x.. where it is not UTF-8
        print(text, flush=True)  # fail here, not at exit, if the disk is full
    except (EOFError, OSError, ValueError) as error:
        server = f"{args.host!r} port {args.port}"
        sys.exit(f"lab4.py: cannot print the phrase from {server}: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # Ctrl-C
        sys.exit(130)  # the status that shells report for it
