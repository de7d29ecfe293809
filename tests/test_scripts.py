"""Every benchmark and script explains itself and answers a mistake in one line, as the `python -m` commands do."""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = [
    file
    for folder in ("benchmarks", "scripts")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text(encoding="utf-8")
]


def run(file: Path, argument: str, monkeypatch) -> int:
    """Run a file as `python FILE ARGUMENT` does, within this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", [str(file), argument])
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    return ended.value.code or 0


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_help_and_a_wrong_option_are_answered(file, monkeypatch, capsys):
    assert run(file, "--help", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ")
    assert err == ""
    assert run(file, "--no-such-option", monkeypatch) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: unknown option --no-such-option")
    assert (out, err.count("\n")) == ("", 1)
