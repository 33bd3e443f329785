"""Tests that the dev container's two files agree on the math server's address."""

import os
import shlex
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from tests.support import POSIX, PYTHON, ROOT, run, started

COMPOSE = (ROOT / ".devcontainer" / "compose.yaml").read_text(encoding="utf-8")
LAUNCH = (ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
COMMAND = COMPOSE.partition(" python3 ")[2].partition("\n")[0]
CHECK = COMPOSE.partition(" test: ")[2].partition("\n")[0]


class DevContainerTest(unittest.TestCase):
    def test_the_files_agree_on_the_host_and_the_port(self):
        self.assertIn('"args": ["mathserver", "8000"]', LAUNCH)
        self.assertEqual(COMPOSE.count(" mathserver:\n"), 2)  # and who depends on it
        self.assertIn(" --port 8000\n", COMPOSE)
        self.assertIn(f":{8000:04X} ", CHECK)

    @POSIX
    @unittest.skipUnless(os.path.exists("/proc/net/tcp"), "only Linux has this file")
    def test_the_health_check_passes_only_while_the_server_runs(self):
        with started(*PYTHON, *shlex.split(COMMAND), "--port", 0) as process:
            listening = process.stderr.readline().decode()
            self.assertIn(" listening on 0.0.0.0 port ", listening)
            check = CHECK.replace(f"{8000:04X}", f"{int(listening.split()[-1]):04X}")
            self.assertEqual(run("sh", "-c", check), (b"", "", 0))
        self.assertEqual(run("sh", "-c", check), (b"", "", 1))


if __name__ == "__main__":
    unittest.main()
