"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtrain.disk import atomic_write
from fedtrain.errors import MissingExtraError, RunError, shorten
from fedtrain.records import PERSONAL, DataSummary, Heterogeneity, Manifest, RoundRecord
from fedtrain.report import sections
from fedtrain.report.charts import convergence, label_map, largest_share, per_client, spending
from fedtrain.report.drawing import can_draw
from fedtrain.report.drift import Quantiles
from fedtrain.report.privacy import increments, promise_rows, sentences, warnings
from fedtrain.report.quality import quality
from fedtrain.report.tables import MOST_ROWS, data_uri, thinned
from fedtrain.report.text import show_bytes, show_epsilon, show_metric, show_seconds, summary
from fedtrain.report.view import SERIES, ClientScore, Facts, RunView, client_scores, measured

__all__ = ["write_report"]

_WORST = 8  # clients that are named

_MEANINGS = {
    "l1": (
        "L1 distance",
        "0 to 2",
        "Twice the share of a client's examples that would need another label to match everyone's mix.",
    ),
    "hellinger": (
        "Hellinger distance",
        "0 to 1",
        "The same question, with more weight on labels that are missing altogether.",
    ),
    "jensen_shannon": (
        "Jensen-Shannon divergence",
        "0 to 1 bit",
        "How much one example's label tells about which client it came from.",
    ),
    "labels_per_client": ("Labels per client", "", "Mean number of different labels that a client holds."),
    "size_gini": (
        "Gini coefficient of sizes",
        "0 to 1",
        "0: all clients hold equally many examples; near 1: one client holds almost all.",
    ),
}


def write_report(run: RunView, path: Path) -> None:
    """Write the report of a run, finished or not, in place of an older one.

    Args:
        run: what to report.
        path: the HTML file; its folder must exist.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        RunError: the file cannot be written.
    """
    page = _render(run).encode("utf-8", errors="replace")
    try:
        atomic_write(path, lambda file: file.write(page))
    except OSError as exc:
        raise RunError(
            "the report cannot be written",
            got=f"{path}: {exc.strerror}",
            hint="The run itself is kept; write its report again with: fedtrain report RUN",
        ) from exc


def _render(run: RunView) -> str:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - the charts need it
    except ImportError as exc:
        raise MissingExtraError(exc.name or "jinja2", "report", "The report") from exc
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": shorten,
        "metric": lambda value, name: show_metric(name, value),
        "bytes": show_bytes,
        "epsilon": show_epsilon,
        "seconds": show_seconds,
    }
    return environment.get_template("report.html").render(_context(run))


def _context(run: RunView) -> dict[str, Any]:
    facts = Facts.of(run)
    scores = client_scores(run, facts.metric)
    records = thinned(run.records)
    return {
        "run": run,
        "facts": facts,
        "summary": summary(run),
        "series": {part: words for part, words in SERIES.items() if any(measured(r, part) for r in run.records)},
        "convergence": convergence(run, facts),
        "convergence_csv": data_uri(_convergence_rows(run.records, facts)),
        "quality": quality(run),
        "labels": _labels(run.data) if run.data and run.data.label_names else None,
        "heterogeneity": _heterogeneity(run.data.heterogeneity) if run.data and run.data.heterogeneity else [],
        "scores": scores,
        "scores_chart": per_client(scores, facts) if scores else "",
        "scores_csv": data_uri(_score_rows(scores, facts)),
        "not_drawn": sum(not can_draw(score.value) for score in scores),
        "worst": scores[:_WORST],
        "privacy": _privacy(run, facts) if run.privacy else None,
        "communication": sections.communication(run, facts),
        "timeline": sections.timeline(run, facts),
        "participation": sections.participation(run),
        "fairness": sections.fairness(run, facts),
        "drift": sections.drift(run),
        "labels_and_results": sections.labels_and_results(run, facts),
        "turned_away": _turned_away(facts)[:MOST_ROWS],
        "records": records,
        "columns": _columns(run, facts),
        "left_out": len(run.records) - len(records),
        "manifest": _manifest_rows(run.manifest),
    }


def _privacy(run: RunView, facts: Facts) -> dict[str, Any]:
    added = increments(run.records)
    header: list[object] = ["round", "epsilon", "epsilon_of_round", f"central_{facts.metric}"]
    rows: list[list[object]] = [
        [r.round_number, r.epsilon, added[r.round_number], r.central.get(facts.metric, "")]
        for r in run.records
        if r.epsilon is not None
    ]
    return {
        "warnings": warnings(run, facts),
        "sentences": sentences(run, facts),
        "charts": spending(run, facts),
        "csv": data_uri([header, *thinned(rows)]),
        "rows": promise_rows(run, facts),
    }


def _turned_away(facts: Facts) -> list[tuple[int, str, str, str]]:
    """(round, client, why its update was not used, what follows from it) of each case, in the order of rounds."""
    gone = "Set aside for the rest of the run."
    cases = [(*case, gone if (case[0], case[1]) in facts.set_aside else "") for case in facts.quarantined]
    ended = "its budget or its policy allows no more"
    cases += [(number, client, ended, "Ended: takes no further part.") for number, client in facts.ended]
    return sorted(cases, key=lambda case: case[0])


def _columns(run: RunView, facts: Facts) -> list[tuple[str, Callable[[RoundRecord], str]]]:
    """(name, what to show of a record) of each column of the rounds' table; what no round can have is left out."""
    metric, private, added = facts.metric, run.privacy is not None, increments(run.records)
    columns: list[tuple[bool, str, Callable[[RoundRecord], str]]] = [
        (True, "Round", lambda r: str(r.round_number)),
        (True, "Clients", lambda r: str(len(r.participants))),
        (True, "Quarantined", lambda r: str(len(r.quarantined))),
        (bool(facts.ended), "Ended", lambda r: str(len(r.ended))),
        (bool(facts.late), "Late", lambda r: str(len(r.late))),
        (bool(facts.staleness), "Staleness", lambda r: f"{r.staleness:.1f}"),
        (not private, "Examples", lambda r: f"{r.num_examples:,}"),
        (private, "Epsilon", lambda r: show_epsilon(r.epsilon)),
        (private, "of this round", lambda r: show_epsilon(added.get(r.round_number))),
        (True, f"Central {shorten(metric)}", lambda r: show_metric(metric, r.central.get(metric))),
        (True, "Central loss", lambda r: show_metric("loss", r.central.get("loss"))),
        (not private, "Training loss", lambda r: show_metric("loss", r.train.get("loss"))),
        (True, "Update norm", lambda r: show_metric("norm", r.update_norm)),
        (any(r.drift for r in run.records), "Median cosine", _cosine),
        (True, "Up", lambda r: show_bytes(r.bytes_up)),
        (True, "Down", lambda r: show_bytes(r.bytes_down)),
        (True, "Seconds", lambda r: f"{r.seconds_train + r.seconds_evaluate:.2f}"),
        (bool(facts.virtual_seconds), "Virtual seconds", lambda r: f"{r.virtual_seconds:,.2f}"),
        (any(r.wasted_seconds for r in run.records), "wasted by clients", lambda r: f"{r.wasted_seconds:,.2f}"),
    ]
    return [(name, show) for shown, name, show in columns if shown]


def _labels(data: DataSummary) -> dict[str, Any]:
    header = ["client", "examples", *data.label_names]
    rows = zip(data.shown_clients, data.shown_sizes, data.label_counts)
    return {
        "chart": label_map(data),
        "csv": data_uri([header, *([client, size, *counts] for client, size, counts in rows)]),
        "largest_share": largest_share(data),
    }


def _heterogeneity(measured: Heterogeneity) -> list[tuple[str, str, str, str]]:
    """(name, value, range, meaning) of each number."""
    return [
        (name, f"{getattr(measured, field):.2f}", span, meaning) for field, (name, span, meaning) in _MEANINGS.items()
    ]


def _manifest_rows(manifest: Manifest) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in manifest:
        if isinstance(value, dict):
            rows += [(f"{name}: {key}", entry) for key, entry in value.items()]
        else:
            rows.append((name.replace("_", " "), value))
    return rows


def _convergence_rows(records: Sequence[RoundRecord], facts: Facts) -> list[list[object]]:
    """One row a round, with the running totals that the charts use."""
    columns = sorted({(part, name) for r in records for part in SERIES for name in measured(r, part)})
    moved, seconds, virtual = 0, 0.0, 0.0
    rows: list[list[object]] = []
    for record in records:
        moved += record.bytes_up + record.bytes_down
        seconds += record.seconds_train + record.seconds_evaluate
        virtual += record.virtual_seconds
        clock = [virtual] if facts.virtual_seconds else []
        values = [measured(record, part).get(name, "") for part, name in columns]
        rows.append([record.round_number, moved, seconds, *clock, *values])
    clock_name = ["virtual_seconds"] if facts.virtual_seconds else []
    header = ["round", "bytes_moved", "seconds", *clock_name, *(f"{part}_{name}" for part, name in columns)]
    return [list[object](header), *thinned(rows)]


def _score_rows(scores: Sequence[ClientScore], facts: Facts) -> list[list[object]]:
    header: list[object] = ["client", facts.metric, "loss", "num_examples"]
    rows: list[list[object]] = [[s.client, s.value, s.loss, s.num_examples] for s in thinned(scores)]
    if facts.personal:
        header.append(f"{PERSONAL}{facts.metric}")
        for row, score in zip(rows, thinned(scores)):
            row.append("" if score.personal is None else score.personal)
    return [header, *rows]


def _cosine(record: RoundRecord) -> str:
    return f"{Quantiles.of([cosine for cosine, _ in record.drift.values()]).median:.2f}" if record.drift else "-"
