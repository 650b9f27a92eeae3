"""The help of every command, against golden files; `python tests/cli/test_help.py` writes them anew."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from fedtrain.cli.app import app

GOLDEN = Path(__file__).with_name("golden")


def commands(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[click.Command, click.Context]]:
    # In a terminal of 80 columns click writes help 78 wide.
    context = click.Context(command, parent, info_name=name, terminal_width=78)
    yield command, context
    for sub_name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, sub_name, context)


def everything() -> dict[str, tuple[click.Command, str]]:
    found = commands(typer.main.get_command(app), "fedtrain")
    return {context.command_path: (command, command.get_help(context) + "\n") for command, context in found}


def golden(path: str) -> Path:
    return GOLDEN / f"{path.replace(' ', '-')}.txt"


@pytest.mark.parametrize("path", everything())
def test_help_is_as_in_the_golden_file(path: str) -> None:
    assert everything()[path][1] == golden(path).read_text()


@pytest.mark.parametrize("path", everything())
def test_help_says_what_the_command_does_and_names_its_options(path: str) -> None:
    command, shown = everything()[path]
    assert command.help
    assert "..." not in shown.partition("Commands:")[2], "the first sentence is cut: make it shorter"
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        assert getattr(parameter, "help", None), parameter.name
        for name in parameter.opts if isinstance(parameter, click.Option) else [parameter.make_metavar(None)]:
            assert name.strip("[]") in shown


def test_there_is_no_golden_file_of_a_command_that_is_gone() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == {golden(path).name for path in everything()}


if __name__ == "__main__":
    for path, (_, shown) in everything().items():
        golden(path).write_text(shown)
