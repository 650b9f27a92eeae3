from __future__ import annotations

import csv
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from fedtrain.errors import MissingExtraError, RunError
from fedtrain.records import RoundRecord
from fedtrain.report.html import write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self.headers: list[str] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._open = tag
        attributes = dict(attrs)
        self.targets += [value for name, value in attrs if name in ("href", "xlink:href", "src", "action")]
        if "download" in attributes:
            table = unquote(attributes["href"].partition(",")[2])
            self.tables[attributes["download"]] = list(csv.reader(io.StringIO(table)))

    def handle_data(self, data):
        self.words += data
        if self._open == "th":
            self.headers.append(data)

    def handle_endtag(self, tag):
        self._open = ""


@pytest.fixture
def page_of(tmp_path):
    def write(run):
        write_report(run, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def html(make_run, tmp_path_factory):
    """The report of one whole run, written once."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make_run(), path)
    return path.read_text(encoding="utf-8")


def test_the_page_tells_the_run(html):
    page = Page(html)
    for text in (
        "digits-noniid",
        "Strongly skewed labels: a client holds 3.1 of 10 labels on average",
        "Central accuracy: 88.6% after round 40; best 89.9% after round 38.",
        "Target accuracy 85.0%: reached in round 26, after 57.5 MB up and 57.4 MB down.",
        'partition = { kind = "dirichlet", alpha = 0.3 }',
        "versions: torch",
        "5f" * 32,
    ):
        assert text in page.words
    assert "Quarantined updates" not in page.words


def test_the_page_asks_for_nothing_outside_itself(html):
    page = Page(html)
    assert page.targets
    assert all(target.startswith(("data:", "#")) for target in page.targets)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert re.findall(r"url\((?!#)|@import|https?:", html) == []


def test_every_chart_has_its_numbers_behind_it(html, make_run):
    run, tables = make_run(), Page(html).tables
    shown = ("convergence", "labels", "clients", "labels-result", "bytes", "bytes-total", "participation")
    assert set(tables) == {f"digits-noniid-{name}.csv" for name in shown}
    header, *rounds = tables["digits-noniid-convergence.csv"]
    last = dict(zip(header, rounds[-1]))
    assert len(rounds) == 41
    assert last["round"] == "40"
    assert last["bytes_moved"] == str(40 * (2_211_000 + 2_209_500))
    assert float(last["central_accuracy"]) == pytest.approx(run.records[-1].central["accuracy"], rel=1e-6)
    header, *labels = tables["digits-noniid-labels.csv"]
    assert header == ["client", "examples", *"0123456789"]
    assert labels[3] == ["client-03", str(run.data.shown_sizes[3]), *map(str, run.data.label_counts[3])]
    header, *clients = tables["digits-noniid-clients.csv"]
    assert header == ["client", "accuracy", "loss", "num_examples"]
    assert len(clients) == 20
    assert clients == sorted(clients, key=lambda row: float(row[1]))


SECTIONS = {
    "The clients from round to round": ("fairness", "fairness-clients"),
    "Clients whose labels differ": ("labels-result", "labels-cosine", "labels-norm"),
    "How the updates differ": ("drift-cosine", "drift-norm", "diversity"),
    "Communication": ("bytes", "bytes-total", "bytes-clients"),
    "Predicted time, on the virtual clock": ("timeline",),
    "Whose updates were used": ("participation",),
}


@pytest.fixture(scope="module")
def everything(whole_run, tmp_path_factory):
    """The report of a run with every section, whose clients have names made to break the page."""
    evil = {name: f"<script>{name}</script>\"'&$\\x$\x1b" for name in whole_run.data.shown_clients}
    evil["client-19"] = "=cmd()"

    def rename(record):
        lists = {field: [evil[name] for name in getattr(record, field)] for field in ("participants", "late")}
        tables = {
            field: {evil[name]: value for name, value in getattr(record, field).items()}
            for field in ("client_bytes", "drift", "per_client", "quarantined")
        }
        return record.model_copy(update=lists | tables)

    data = whole_run.data.model_copy(update={"shown_clients": list(evil.values())})
    path = tmp_path_factory.mktemp("everything") / "report.html"
    write_report(replace(whole_run, records=list(map(rename, whole_run.records)), data=data), path)
    return path.read_text(encoding="utf-8")


def test_a_run_with_everything_has_every_section_and_its_numbers(everything):
    page = Page(everything)
    files = ("convergence", "labels", "clients", *(file for files in SECTIONS.values() for file in files))
    assert set(page.tables) == {f"digits-noniid-{file}.csv" for file in files}
    for header, *rows in page.tables.values():
        assert rows
        assert {len(row) for row in rows} == {len(header)}
    for figure in re.findall("<figure.*?</figure>", everything, flags=re.DOTALL)[1:]:  # the first has its link below
        assert (figure.count("<svg"), figure.count("download=")) == (1, 1)
    assert all(f"<h2>{title}</h2>" in everything for title in SECTIONS)
    assert {"Median cosine", "wasted by clients"} <= set(page.headers)
    assert "0.74900 B10.0 kB" in page.words  # the cells of round 1
    ids = re.findall(r' id="([^"]+)"', everything)
    assert len(ids) == len(set(ids))


def test_sections_with_nothing_to_show_are_absent(page_of, make_run, tmp_path):
    page_of(make_run(records=[RoundRecord(round_number=1, central={"loss": 1.0})], data=None))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not [title for title in SECTIONS if title in text]


def test_hostile_names_are_text_in_every_section(everything):
    page = Page(everything)
    assert not page.tags & {"script", "b"}
    assert "<script>client" in page.words
    assert "\x1b" not in everything
    assert page.tables["digits-noniid-bytes-clients.csv"][1][0] == "'=cmd()"


def test_a_run_with_late_set_aside_and_personal_tells_each(page_of, make_run, make_records):
    *earlier, last = make_records(2)
    own = {name: values | {"personal_accuracy": 0.5} for name, values in last.per_client.items()}
    changes = {"clients": {"accuracy": 0.4, "personal_accuracy": 0.5}, "per_client": own}
    changes |= {"late": ["client-11"], "quarantined": {"eve": "NaN", "bob": "NaN"}, "set_aside": ["eve"]}
    changes |= {"staleness": 1.25, "virtual_seconds": 7200.0}
    page = page_of(make_run(records=[*earlier, last.model_copy(update=changes)]))
    assert page.words.count("Set aside for the rest of the run.") == 1
    for text in (
        "2.0 hours on the virtual clock",
        "personal models 50.0%, worst tenth 50.0%",
        "clients' personal models",
        "with its personal model",
        "LateStaleness",
        "Virtual seconds",
    ):
        assert text in page.words
    header, *rounds = page.tables["digits-noniid-convergence.csv"]
    assert dict(zip(header, rounds[-1]))["virtual_seconds"] == "7200"
    assert dict(zip(header, rounds[-1]))["personal_accuracy"] == "0.5"
    header, *clients = page.tables["digits-noniid-clients.csv"]
    assert header == ["client", "accuracy", "loss", "num_examples", "personal_accuracy"]
    assert {row[4] for row in clients} == {"0.5"}


def test_a_run_without_a_virtual_clock_or_personal_models_names_neither(html):
    words = Page(html).words
    assert not [word for word in ("irtual clock", "ersonal model", "Late", "Staleness", "et aside") if word in words]


def test_hostile_names_are_text_and_odd_values_are_named(page_of, hostile_run, tmp_path):
    page = page_of(hostile_run)
    assert not page.tags & {"script", "b"}
    for text in (
        "<script>alert(1)</script>",
        "delta has NaN in <b>layer</b>",
        'a"&<b>$x$\N{REPLACEMENT CHARACTER}[31m',
    ):
        assert text in page.words
    assert "\x1b" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("failed", "not a number", "3 not drawn: not finite, or too large"):
        assert text in page.words
    # A spreadsheet that opens the table must not run a name.
    assert "'=cmd()" in [row[0] for row in page.tables["digits-noniid-clients.csv"]]


@pytest.fixture(scope="module")
def private_page(make_private_run, tmp_path_factory):
    """The report of one private run, written once."""
    path = tmp_path_factory.mktemp("private") / "report.html"
    write_report(make_private_run(), path)
    return Page(path.read_text(encoding="utf-8"))


def test_a_private_run_tells_what_it_spent_on_whom(private_page):
    page = private_page
    for text in (
        "Privacy: epsilon 7.8 at delta 1e-05 (each example, add/remove one, PRV), planned 8",
        "Epsilon spent at most by any client, as the server counts it: 7.8 after 40 of 40 rounds; "
        "planned for the whole run: 8.",
        "Over 40 rounds, each example is protected against everybody",
        "Epsilon 7.8 means: ",
        "Noise multiplier0.83 to 1.42, from client to client",
        "such as how the data lies",
    ):
        assert text in page.words
    for text in ("NOT PRIVATE", "Nothing is protected", "more than the planned", "not yet in the figure"):
        assert text not in page.words
    header, *rows = page.tables["digits-noniid-privacy.csv"]
    assert header == ["round", "epsilon", "epsilon_of_round", "central_accuracy"]
    assert (rows[0][:3], rows[2][:3], len(rows)) == (["0", "0", "0"], ["2", "0.39", "0.195"], 41)


def test_the_rounds_of_a_private_run_show_epsilon_and_leave_out_what_it_does_not_tell(private_page, html):
    private, plain = private_page, Page(html)
    assert {"Epsilon", "of this round"} <= set(private.headers)
    assert not {"Examples", "Training loss", "Ended"} & set(private.headers)
    assert "0.390.195" in private.words  # the cells of round 2
    assert {"Examples", "Training loss"} <= set(plain.headers)
    assert not {"Epsilon", "of this round"} & set(plain.headers)


def test_a_plain_run_says_in_one_line_that_nothing_is_protected(html):
    page = Page(html)
    assert page.words.count("Nothing is protected: the updates that clients send may tell of their examples.") == 1
    assert not [text for text in ("psilon", "NOT PRIVATE", "Ended") if text in page.words]


@pytest.mark.parametrize(
    ("records", "section"),
    [([], "NOT PRIVATE</p>"), (None, "NOT PRIVATE: the noise follows from a seed")],
    ids=["before its first record", "finished"],
)
def test_seeded_noise_is_not_private_in_red_at_the_top_and_in_its_section(
    page_of, make_private_run, tmp_path, records, section
):
    run = make_private_run({"seeded": True, "ledgers": ""}, rounds=1)
    words = page_of(run if records is None else replace(run, records=records, data=None)).words
    assert ("Nothing recorded yet; planned for the whole run: 8." in words) == (records == [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    top, below = (place.start() for place in re.finditer('<p class="alarm">NOT PRIVATE', text))
    assert top < text.index('<p class="headline">') < text.index("<h2>Privacy</h2>") < below
    assert text[below:].startswith(f'<p class="alarm">{section}')
    assert ".alarm { margin: 0 0 .75rem; color: var(--alarm); font-size: 2rem" in text


def test_a_private_run_that_spent_too_much_is_unfinished_and_lost_clients_says_so(
    page_of, make_private_run, make_manifest
):
    run = make_private_run({"planned_epsilon": 0.3, "unit": "client", "delta": 0.1}, rounds=2)
    *earlier, last = run.records
    gone = {"ended": ["zoe", "<b>"], "quarantined": {"eve": "NaN"}, "set_aside": ["eve"]}
    records, interrupted = [*earlier, last.model_copy(update=gone)], make_manifest(status="interrupted")
    page = page_of(replace(run, records=records, manifest=interrupted))
    for text in (
        "Epsilon 0.39 was spent, more than the planned 0.3",
        "Delta 0.1 is not below 1/20",
        "Epsilon spent: 0.39 after 2 of 40 rounds",
        "not yet in the figure",
        "such as who took part",
        "Quarantined updates and clients that have ended",
        "NaN Set aside for the rest of the run.",
        "its budget or its policy allows no more Ended: takes no further part.",
        "zoe in round 2, <b> in round 2",
    ):
        assert text in page.words
    assert page.words.count("Ended: takes no further part.") == 2
    assert "Ended" in page.headers
    assert "b" not in page.tags


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_just_began(page_of, make_run, make_records, make_manifest, rounds):
    began = make_manifest(status="running")
    page = page_of(make_run(records=make_records(rounds), data=None, manifest=began))
    assert f"{rounds} of 40 rounds" in page.words


def test_a_run_before_its_first_record(page_of, make_run):
    assert "Nothing was measured yet." in page_of(make_run(records=[], data=None)).words


def test_a_regression_on_text_or_numbers(page_of, make_run, make_data):
    no_labels = {"label_names": [], "label_counts": [[]] * 20, "heterogeneity": None}
    records = [RoundRecord(round_number=n, central={"loss": 9.0 / n, "mae": 3.0 / n}) for n in (1, 2, 3)]
    page = page_of(make_run(records=records, data=make_data().model_copy(update=no_labels)))
    assert "Central mae: 1 after round 3, the best of the run." in page.words
    assert "image" not in page.tags  # no label map
    assert set(page.tables) == {"digits-noniid-convergence.csv"}


def test_a_long_run_on_many_clients_stays_small(page_of, make_run, make_records, make_data, tmp_path):
    page = page_of(make_run(records=make_records(2500, 10_000), data=make_data(10_000, 200)))
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert "An even sample of 200 of 10,000 clients" in page.words
    assert "2000 rounds, evenly spaced" in page.words
    rounds = [row[0] for row in page.tables["digits-noniid-convergence.csv"][1:]]
    assert (len(rounds), rounds[0], rounds[-1]) == (2000, "0", "2500")


def test_the_same_run_gives_the_same_bytes(html, make_run, tmp_path):
    write_report(make_run(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_a_folder_that_cannot_be_written_is_named(make_run, tmp_path):
    with pytest.raises(RunError, match=r"the report cannot be written.*fedtrain report RUN"):
        write_report(make_run(records=[], data=None), tmp_path / "absent" / "report.html")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named_and_the_old_report_kept(make_run, tmp_path, monkeypatch, package):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*fedtrain\[report\]"):
        write_report(make_run(), path)
    assert path.read_text() == "old"
