"""The documents say what the code does: generated pages are current, and the README's commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from hybrid.cli import app

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["scripts/job_docs.py", "scripts/catalog_docs.py"])
def test_a_generated_page_is_what_its_script_writes(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _console_lines(page: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.split("  #")[0].strip() for line in lines]


def test_every_hybrid_command_of_the_readme_exists_with_its_options() -> None:
    root = typer.main.get_command(app)
    commands = [line.split() for line in _console_lines("README.md") if line.startswith("hybrid ")]
    assert len(commands) >= 6
    for words in commands:
        command = root
        for word in words[1:]:
            if isinstance(command, click.Group) or hasattr(command, "commands"):
                assert word in command.commands, f"{' '.join(words)}: no command {word}"
                command = command.commands[word]
            elif word.startswith("--"):
                options = {option for parameter in command.params for option in parameter.opts}
                assert word in options, f"{' '.join(words)}: no option {word}; valid: {sorted(options)}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {line.split()[1] for line in _console_lines("README.md") if line.startswith("make ")}
    assert {"demo", "test", "lint"} <= named
    assert named <= targets


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
