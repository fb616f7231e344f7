"""The pages against the program and the tree: in docs/cli.md every command's help, word for word.

`python tests/test_docs.py`, with edge installed, writes the help of today into the page.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import click
import make_models_page
import pytest

from edge.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
#: What may speak of names in the code.
TEXTS = [
    *sorted((ROOT / "edge").rglob("*.py")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "README.md",
]
HEADING = "## Commands\n"


def help_of(name: str) -> str:
    """`edge-run NAME --help`, 80 columns wide; the group's own for an empty name."""
    parent = click.Context(cli, info_name="edge-run", terminal_width=80, **cli.context_settings)
    if not name:
        return cli.get_help(parent)
    command = cli.get_command(parent, name)
    assert command is not None
    return command.get_help(
        click.Context(command, parent=parent, info_name=name, terminal_width=80)
    )


def generated() -> str:
    """The page's last part."""
    parts = [HEADING]
    for name in ("", *COMMANDS):
        title = f"edge-run {name}".strip()
        parts.append(f"### `{title}`\n\n```\n{help_of(name)}\n```\n")
    return "\n".join(parts)


def words(text: str) -> list[str]:
    """Text without its line breaks, which differ between versions of click."""
    return text.split()


def test_page_of_models_is_up_to_date() -> None:
    assert make_models_page.PAGE.read_text(encoding="utf-8") == make_models_page.page()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_in_the_page(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    title = re.escape(f"### `edge-run {name}".strip())
    match = re.search(rf"{title}`\n\n```\n(.*?)\n```\n", page, re.DOTALL)
    assert match, f"docs/cli.md does not have {name or 'edge-run'}: run python {__file__}"
    assert words(match[1]) == words(help_of(name)), f"stale: run python {__file__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    text = help_of(name)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"
            assert all(flag in text for flag in parameter.opts)


def test_the_page_names_no_option_that_is_gone() -> None:
    prose = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
    known = "\n".join(help_of(name) for name in ("", *COMMANDS))
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose):
        assert flag in known, f"docs/cli.md speaks of {flag}"


ROOT = PAGE.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_name_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^):#]+)\)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"`((?:examples|scripts)/[\w./]+)`", text):
        assert (ROOT / script).exists(), script
    assert set(re.findall(r"`edge-run ([a-z]+)\b", text)) <= set(COMMANDS)


def named(name: str) -> Any:
    """What a dotted name stands for. Raises ImportError, AttributeError."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for n, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:n]))
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_dotted_names_can_be_imported(path: Path) -> None:
    files = ("h", "json", "dll")  # edge.h, edge.json, edge.dll
    for name in re.findall(r"`(edge(?:\.[A-Za-z_]\w*)+)", path.read_text(encoding="utf-8")):
        if name.rpartition(".")[2] not in files:
            named(name)


if __name__ == "__main__":
    prose = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
    PAGE.write_text(prose + generated(), encoding="utf-8")
