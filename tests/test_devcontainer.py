"""Tests of the dev container: its files agree, and the health check works."""

import os
import re
import shlex
import unittest

from tests.support import POSIX, PYTHON, ROOT, TestCase, run, started

HOST = "mathserver"
PORT = 8000
FOLDER = ROOT / ".devcontainer"
TABLE = "/proc/net/tcp"  # what listens


@unittest.skipUnless(FOLDER.exists(), "this copy has no hidden folders")
class DevContainerTest(TestCase):
    def test_the_files_agree_on_the_host_and_the_port(self):
        for file, words in (
            ("devcontainer.json", f'"args": ["{HOST}", "{PORT}"]'),
            ("compose.yaml", f"\n  {HOST}:\n"),
            ("compose.yaml", f"\n    depends_on:\n      {HOST}:\n"),
            ("compose.yaml", f" tests/mathserver.py --bind 0.0.0.0 --port {PORT}\n"),
            ("../README.md", f"\npython3 lab4.py {HOST} {PORT}\n"),
        ):
            with self.subTest(file, words=words):
                self.assertTrue(words in (FOLDER / file).read_text(encoding="utf-8"))

    @POSIX
    @unittest.skipUnless(os.access(TABLE, os.R_OK), "only Linux has " + TABLE)
    def test_the_health_check_passes_only_while_the_server_runs(self):
        compose = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
        (command,) = re.findall("command: python3 (.*)", compose)
        (check,) = re.findall("test: (.*)", compose)
        with started(*PYTHON, *shlex.split(command), "--port", 0) as process:
            port = int(process.stderr.readline().split()[-1])
            check = check.replace(f":{PORT:04X} ", f":{port:04X} ")
            self.assertEqual(run("sh", "-c", check).status, 0)
        self.assertEqual(run("sh", "-c", check).status, 1)
