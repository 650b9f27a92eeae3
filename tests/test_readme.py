"""What README.md shows is run, in its order and in one folder: the blocks below a `<!-- run -->`."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from fedtrain.cli.app import app
from fedtrain.experiment import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^<!-- run -->\n```(console|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def steps(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the output that is shown."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def shape(line: str) -> str:
    """A line without its numbers, which vary with the machine."""
    return re.sub(r"[\d.,]+", "#", " ".join(line.split()))


def test_what_the_readme_shows_is_what_happens(
    fedtrain: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert len(BLOCKS) == 9
    for language, block in BLOCKS:
        if language == "python":
            assert len(block.partition("\n\n")[2].splitlines()) == 3
            exec(block, {})
            continue
        for command, output in steps(block):
            program, *arguments = shlex.split(command)
            assert program == "fedtrain"
            result = fedtrain(*arguments)
            assert result.code == 0, result.err
            told = [shape(line) for line in result.out.splitlines()]
            for line in output:
                assert line == "..." or shape(line) in told
    assert Path("skew.svg").exists()


def test_the_experiment_file_shown_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(shown.splitlines()) == 10
    (tmp_path / "shown.toml").write_text(shown)
    assert load(tmp_path / "shown.toml").data.clients == 100


def test_every_command_is_in_the_table() -> None:
    names = set()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inside = getattr(command, "commands", {})
        names |= {f"{name} {sub}" for sub in inside}
        if not inside or command.invoke_without_command:
            names.add(name)
    assert set(re.findall(r"^\| `fedtrain ([a-z-]+(?: [a-z]+)?)", README, re.MULTILINE)) == names


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def table(heading: str) -> list[tuple[str, str]]:
    """First and last cell of each row of the table below a heading of docs/data.md."""
    section = (ROOT / "docs" / "data.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [(row[0].strip(" `"), row[-1].strip()) for row in rows[1:]]


def test_every_source_is_documented() -> None:
    from fedtrain.data.fetch import OFFICIAL
    from fedtrain.data.sources import SOURCES

    files = dict(table("Sources"))
    assert list(files) == list(SOURCES)
    assert {name for name, how in files.items() if how == f"`fedtrain data fetch {name}`"} == set(OFFICIAL)
    assert {name for name, how in files.items() if how == "none needed"} == {
        name for name, source in SOURCES.items() if not source.needs_root
    }


def test_every_partition_is_documented() -> None:
    from fedtrain.experiment.schema import schema_tree, variants

    _, kinds = variants(schema_tree()["properties"]["data"]["properties"]["partition"])
    assert [kind for kind, _ in table("Partitions")] == list(kinds)
