"""Tests that the dev container's two files agree on the math server's address."""

import re
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import PYTHON, ROOT, started


def words(name):
    """Return the words of a file in .devcontainer, without quotes and comments."""
    text = (ROOT / ".devcontainer" / name).read_text()
    return re.sub(r"""(?m)(^|\s)(#|//).*|["',:\[\]]""", " ", text).split()


class DevContainerTest(unittest.TestCase):
    def test_the_launch_configuration_names_the_math_server(self):
        launch, compose = words("devcontainer.json"), words("compose.yaml")
        host, port = launch[launch.index("args") + 1 :][:2]
        self.assertIn(host, compose)
        self.assertEqual(compose[compose.index("--port") + 1], port)

    def test_the_math_server_accepts_its_command(self):
        compose = words("compose.yaml")
        start = compose.index("tests/mathserver.py")
        line = (*compose[start : start + 5], "--port", 0)
        with started(*PYTHON, *line, cwd=ROOT) as process:
            self.assertIn(b" listening on 0.0.0.0 port ", process.stderr.readline())


if __name__ == "__main__":
    unittest.main()
