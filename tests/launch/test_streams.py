"""Output that can't be written, or not in the terminal's encoding."""

import os
import subprocess
import sys
from pathlib import Path

SAY = """
import os, sys
from convneur.launch.streams import close_output, escape_output, outlast_output
escape_output()
if "last" in sys.argv:
    outlast_output()
print("run", sys.argv[1])
sys.exit(close_output())
"""


def say(name: str | bytes, *words: str, stdout: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", SAY, name, *words]
    env = os.environ | {"PYTHONUNBUFFERED": ""} | env
    return subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=60)  # type: ignore[call-overload, no-any-return]


def test_names_are_printed_in_any_encoding(tmp_path: Path) -> None:
    for encoding, expected in (("ascii", rb"run \xfc"), ("utf-8", "run ü".encode())):
        said = say("ü", stdout=subprocess.PIPE, PYTHONIOENCODING=encoding)
        assert (said.returncode, said.stderr) == (0, b"")
        assert said.stdout.startswith(expected)
    said = say(b"\xff", stdout=subprocess.PIPE)  # a path's bytes come out as they went in
    assert (said.returncode, said.stdout) == (0, b"run \xff\n")


def test_only_training_outlasts_its_output() -> None:
    with Path("/dev/full").open("w") as full:
        said = say("a", "last", stdout=full)
    assert (said.returncode, said.stderr) == (0, b"")
    reader, writer = os.pipe()
    os.close(reader)
    for words, status in (((), 1), (("last",), 0)):
        said = say("a", *words, stdout=writer)
        assert (said.returncode, said.stderr) == (status, b"")
    os.close(writer)


def test_closed_streams_are_opened_on_nothing() -> None:
    program = "import os\nfrom convneur.launch.streams import escape_output\nescape_output()\nprint('lost')\n"
    program += "assert os.open('/dev/zero', os.O_RDONLY) > 2"
    command = f'exec "{sys.executable}" -c "{program}" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
