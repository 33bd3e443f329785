"""Tests that the dev container's two files agree on the math server's address."""

import re
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import PYTHON, ROOT, started


def words(name):
    """Return the words of a file in .devcontainer, without quotes and comments."""
    text = (ROOT / ".devcontainer" / name).read_text(encoding="utf-8")
    return re.sub(r"""(?m)(^|\s)(#|//).*|["',:\[\]]""", " ", text).split()


class DevContainerTest(unittest.TestCase):
    def test_the_files_agree_on_the_host_and_the_port(self):
        launch, compose = words("devcontainer.json"), words("compose.yaml")
        host, port = launch[launch.index("args") + 1 :][:2]
        self.assertEqual(compose.count(host), 2)  # the service, and who depends on it
        self.assertEqual(compose[compose.index("--port") + 1], port)
        self.assertIn(f"{int(port):04X}", compose)  # as /proc/net/tcp has it

    def test_the_math_server_accepts_its_command(self):
        compose = words("compose.yaml")
        command = compose[compose.index("tests/mathserver.py") :][:5]
        with started(*PYTHON, *command, "--port", 0) as process:
            self.assertIn(b" listening on 0.0.0.0 port ", process.stderr.readline())


if __name__ == "__main__":
    unittest.main()
