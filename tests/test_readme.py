"""What the README says runs as it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny import tiny_llama

NAMES = r"COMPRESSKIT_[A-Z_]+"
OURS = {"COMPRESSKIT_NOTES", "COMPRESSKIT_PARENT", "COMPRESSKIT_MAX_RESTARTS"}
"""Environment variables that compresskit sets for the processes that it starts."""
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the README's commands name: MODEL, text.jsonl and recipe.yaml."""
    place = tmp_path_factory.mktemp("readme")
    tiny_llama(place / "MODEL")
    rows = (json.dumps({"text": f"Once there were {n} hens. {n} hens laid {n} eggs."}) for n in range(400))
    (place / "text.jsonl").write_text("\n".join(rows))
    (place / "recipe.yaml").write_text(blocks("yaml")[0])
    return place


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("compresskit")]


def test_there_are_commands() -> None:
    assert len(commands()) >= 7


def test_every_environment_variable_is_told() -> None:
    code = "".join(path.read_text() for path in (ROOT / "compresskit").rglob("*.py"))
    assert set(re.findall(rf"\| `({NAMES})` \|", README)) == set(re.findall(NAMES, code)) - OURS


@pytest.mark.slow
def test_every_command_in_order(place: Path) -> None:
    for command in commands():
        argv = [sys.executable, "-m", "compresskit", *command.split()[1:]]
        done = subprocess.run(argv, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if command.startswith("compresskit report"):
            assert done.stderr == "", "it measures nothing, and no library has anything to say"
    assert (place / "report.html").is_file()


@pytest.mark.slow
def test_the_python_block(place: Path) -> None:
    code = blocks("python")[0].replace('"small"', '"small-python"')
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (place / "small-python" / "compresskit.json").is_file()
