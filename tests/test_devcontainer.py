"""Tests that the dev container's two files agree with the repository and each other."""

import json
import sys
import unittest
from pathlib import Path

from test_lab4 import started

ROOT = Path(__file__).resolve().parent.parent


class DevContainerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.config = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
        self.settings = self.config["customizations"]["vscode"]["settings"]
        compose = ROOT / ".devcontainer" / self.config["dockerComposeFile"]
        self.lines = [line.strip() for line in compose.read_text().splitlines()]
        (server,) = (line for line in self.lines if "tests/mathserver.py" in line)
        self.server = server.split()[2:]

    def test_the_launch_configuration_runs_the_lab(self) -> None:
        (launch,) = self.settings["launch"]["configurations"]
        self.assertEqual(launch["program"], "${workspaceFolder}/lab4.py")
        host, port = launch["args"]
        self.assertIn(f"{host}:", self.lines)
        self.assertEqual(port, self.server[self.server.index("--port") + 1])

    def test_the_editor_works_in_the_mounted_repository(self) -> None:
        folder, service = self.config["workspaceFolder"], self.config["service"]
        for line in (f"{service}:", f"working_dir: {folder}", f"- ..:{folder}"):
            self.assertIn(line, self.lines)

    def test_the_testing_view_finds_the_tests(self) -> None:
        *_, folder, _, pattern = self.settings["python.testing.unittestArgs"]
        self.assertIn(Path(__file__).resolve(), (ROOT / folder).glob(pattern))

    def test_the_math_server_accepts_its_command(self) -> None:
        with started(sys.executable, *self.server, "--port", "0", cwd=ROOT) as process:
            self.assertIn(b" listening on 0.0.0.0 port ", process.stderr.readline())
