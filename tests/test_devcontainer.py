"""Tests that the dev container's two files agree with the repository and each other.

What only a reader of YAML or a container engine could tell is left to opening it.
"""

import json
import re
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".devcontainer"


class DevContainerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.config = json.loads((FOLDER / "devcontainer.json").read_text())
        self.settings = self.config["customizations"]["vscode"]["settings"]
        self.compose = (FOLDER / self.config["dockerComposeFile"]).read_text()
        self.services = re.findall(r"^  (\w+):$", self.compose, re.MULTILINE)

    def values(self, pattern: str) -> "list[str]":
        """Return what the group of `pattern` is in each line of the compose file."""
        return re.findall(rf"^ +{pattern}$", self.compose, re.MULTILINE)

    def test_the_launch_configuration_runs_the_lab(self) -> None:
        (launch,) = self.settings["launch"]["configurations"]
        program = launch["program"].replace("${workspaceFolder}", str(ROOT))
        self.assertTrue(Path(program).samefile(ROOT / "lab4.py"))
        host, port = launch["args"]
        self.assertIn(host, self.services)
        self.assertIn(f"--port {port}", self.compose)

    def test_the_editor_works_in_a_service_with_the_repository_mounted(self) -> None:
        self.assertIn(self.config["service"], self.services)
        mounts = self.values(r"- \.\.:([^:]+)(?::ro)?")
        folders = self.values(r"working_dir: (.+)")
        self.assertEqual(len(mounts), len(self.services))
        self.assertEqual({*mounts, *folders}, {self.config["workspaceFolder"]})

    def test_one_image_serves_all(self) -> None:
        images = self.values("image: (.+)")
        self.assertEqual(len(images), len(self.services))
        self.assertEqual(len(set(images)), 1)

    def test_the_testing_view_finds_the_tests(self) -> None:
        self.assertIs(self.settings["python.testing.unittestEnabled"], True)
        options = self.settings["python.testing.unittestArgs"]
        folder = ROOT / options[options.index("-s") + 1]
        pattern = options[options.index("-p") + 1]
        self.assertIn(Path(__file__).resolve(), folder.glob(pattern))

    def test_the_math_server_accepts_its_command(self) -> None:
        (command,) = self.values(r"command: python3 (tests/mathserver\.py.*)")
        with subprocess.Popen(
            [sys.executable, *command.split(), "--port", "0"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stderr is not None
            line = process.stderr.readline().decode()
            process.terminate()
        self.assertRegex(line, r"^mathserver.py: listening on 0\.0\.0\.0 port \d+\n$")


if __name__ == "__main__":
    unittest.main()
