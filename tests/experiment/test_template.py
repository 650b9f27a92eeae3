import re
from pathlib import Path

import pytest

from fedtrain.errors import InputError
from fedtrain.experiment import TEMPLATES, Experiment, identity, load, reference_markdown, render, write
from fedtrain.experiment.schema import schema_tree, variants

DOCS = Path(__file__).parents[2] / "docs" / "experiment.md"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_resolves_to_its_own_values_and_defaults(name):
    written = load(write(name))
    assert written.name == name
    assert identity(written) == identity(Experiment.model_validate(dict(TEMPLATES[name].values)))


def test_a_template_shows_every_key_once():
    shown = re.findall(r"^(?:# )?([a-z_]+) = ", render("digits"), re.MULTILINE)
    expected = []
    for key, node in schema_tree()["properties"].items():
        _, kinds = variants(node)
        chosen = kinds.get("fedavg", kinds.get("sample"))
        expected += chosen["properties"] if chosen else node.get("properties", [key])
    assert shown == expected


def test_a_commented_default_changes_nothing_when_activated(tmp_path):
    entries = re.split(r"^(?=\S)", render("digits"), flags=re.MULTILINE)
    first = next(place for place, entry in enumerate(entries) if entry.startswith("# [privacy]"))
    last = next(place for place, entry in enumerate(entries) if entry.startswith("[gate]"))
    entries[first:last] = []  # the section as a whole is not there by default
    experiment = load(write("digits"))
    unset = []
    for place, entry in enumerate(entries):
        commented = re.match(r"# ([a-z_]+) = ", entry)
        if commented and "not set by default" in re.sub(r"\s+#\s+", " ", entry):
            unset.append(commented[1])
        elif commented:
            activated = [*entries[:place], entry.removeprefix("# "), *entries[place + 1 :]]
            (tmp_path / "activated.toml").write_text("".join(activated))
            assert identity(load(tmp_path / "activated.toml")) == identity(experiment), entry
    # An example is shown of these; candidates and deadline need other keys besides.
    assert unset == [
        *("path", "target", "client_column", "fold"),
        *("gains", "start", "lora"),
        *("candidates", "tags", "deadline", "duration"),
        *("local_steps", "micro_batch_size", "loss", "clip_norm", "clip_value"),
        *("curriculum", "early_stopping", "average"),
        *("max_bytes", "group", "attack", "policy", "ledgers", "data_root"),
    ]


def comments(name: str) -> str:
    return " ".join(line.partition("# ")[2].strip() for line in render(name).splitlines())


def test_a_default_that_is_not_shown_is_told():
    assert "Examples per step; the last batch of a pass may be smaller. (at least 1; default 32)" in comments("digits")
    assert "durations are drawn. (greater than 0; default 1.0)" in comments("digits")


def test_a_section_in_kinds_lists_them_all_with_their_keys():
    text = comments("digits")
    assert "Mean of the updates, weighted by examples" in text
    for name, table in variants(schema_tree()["properties"]["strategy"])[1].items():
        keys = ", ".join(key for key in table["properties"] if key != "name")
        assert f"{name} ({keys})" in text if keys else name in text


def test_a_template_is_narrow_and_explains_each_key():
    lines = render("heart-disease").splitlines()
    assert max(map(len, lines)) <= 110
    assert 'partition = { kind = "natural" }' in "\n".join(lines)
    assert any(
        line.startswith("# quorum = 0.5 ") and "# Least fraction of the clients wanted" in line for line in lines
    )


def test_write_takes_a_templates_name_or_a_path(tmp_path):
    (tmp_path / "sub").mkdir()
    assert write("mnist") == Path("mnist.toml")
    assert load(write("sub/mine.toml")).data.name == "digits"
    assert load(write("sub/text.toml")).data.name == "shakespeare"
    assert load(write("sub/other.toml", template="regression")).data.name == "parkinsons"
    assert sorted(file.name for file in (tmp_path / "sub").iterdir()) == ["mine.toml", "other.toml", "text.toml"]


def test_write_never_overwrites():
    Path("digits.toml").write_text("mine")
    with pytest.raises(InputError, match=r"exists and stays as it is: got digits\.toml"):
        write("digits")
    assert Path("digits.toml").read_text() == "mine"


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(InputError, match=r"got minst; expected one of: digits, .*Did you mean mnist\?"):
        write("minst")
    with pytest.raises(InputError, match="got zzz; expected one of: digits, "):
        write("mine.toml", template="zzz")


def test_a_failed_write_leaves_nothing_behind(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write("absent/mine.toml")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write("digits")
    assert list(tmp_path.iterdir()) == []


def test_the_documented_reference_is_the_generated_one():
    begin, end = "<!-- reference: begin -->\n", "<!-- reference: end -->"
    documented = DOCS.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert documented == reference_markdown()


def test_the_documented_files_load():
    files = re.findall(r"\n```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for text in files[:2]:
        Path("documented.toml").write_text(text)
        assert load(Path("documented.toml")).data.name in ("digits", "fashion-mnist")


def test_the_documented_faults_are_the_real_ones():
    blocks = re.findall(r"<!-- faults: \w+ -->\n```\w+\n(.*?)\n```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    text, output = blocks
    Path("faulty.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        load(Path("faulty.toml"), ["clients.quorum=2"])
    assert str(caught.value) == output
