"""What the report's sections on costs and on unlike data show: charts, the numbers behind them, and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fedtrain.errors import shorten
from fedtrain.report import charts_clients, charts_costs
from fedtrain.report.communication import Communication, Traffic, client_traffic, codecs
from fedtrain.report.drawing import can_draw
from fedtrain.report.drift import ClientLink, client_links, correlation, drift_rounds
from fedtrain.report.fairness import client_grid, evaluations
from fedtrain.report.systems import Clock, Participation, Use
from fedtrain.report.tables import data_uri, thinned
from fedtrain.report.text import link_sentence, show_bytes, show_difference, show_metric, show_seconds
from fedtrain.report.view import Facts, RunView, worst_of

__all__ = ["Chart", "Part", "communication", "drift", "fairness", "labels_and_results", "participation", "timeline"]

_Row = Sequence[object]


@dataclass(frozen=True)
class Chart:
    """A drawing with the numbers behind it."""

    svg: str
    label: str  # what it shows, for those who do not see it
    file: str  # name of its CSV file
    csv: str  # data URI
    note: str = ""  # below it
    ramp: tuple[str, str] | None = None  # of a heat map: what no colour and full colour stand for


@dataclass(frozen=True)
class Part:
    """A section of the page: sentences, charts and a table."""

    charts: Sequence[Chart]
    rows: Sequence[Sequence[str]] = ()  # of the table, the name first
    sentences: Sequence[str] = ()


def communication(run: RunView, facts: Facts) -> Part | None:
    """Show what was sent; None if nothing was."""
    sent = Communication.of(run, facts)
    if sent is None:
        return None
    by_round, in_total = charts_costs.bytes_by_round(run.records, facts.target_round)
    up, down = accumulate(r.bytes_up for r in run.records), accumulate(r.bytes_down for r in run.records)
    rounds: list[_Row] = [(r.round_number, r.bytes_up, r.bytes_down) for r in run.records]
    totals: list[_Row] = [(r.round_number, *both) for r, *both in zip(run.records, up, down)]
    charts = [
        Chart(by_round, "Bytes of each round, up and down", "bytes", _csv(("round", "bytes_up", "bytes_down"), rounds)),
        Chart(
            in_total,
            "Bytes in total over rounds, up and down",
            "bytes-total",
            _csv(("round", "total_up", "total_down"), totals),
        ),
    ]
    traffic = client_traffic(run.records)
    if traffic:
        clients = [(client, t.up, t.down) for client, t in traffic.items()]
        svg = charts_costs.bytes_by_client(list(traffic.values()))
        csv = _csv(("client", "bytes_up", "bytes_down"), clients)
        charts.append(Chart(svg, "Bytes of each client, up and down", "bytes-clients", csv))
    most_round, most = sent.round_most
    most_client, most_of_client = sent.client_most or ("", None)
    found: list[tuple[str, Traffic | None]] = [
        ("In total", sent.total),
        ("A round, on average", sent.round_mean),
        (f"The largest round, {most_round}", most),
        ("A client, on average", sent.client_mean),
        (f"The client with most, {shorten(most_client, 40)}", most_of_client),
        ("A client in one of its rounds, on average", sent.turn_mean),
        (f"Until the target was reached in round {facts.target_round}", sent.target),
    ]
    rows = [(name, show_bytes(t.up), show_bytes(t.down), show_bytes(t.both)) for name, t in found if t]
    words = codecs(run.experiment)
    return Part(charts, rows, [words] if words else [])


def timeline(run: RunView, facts: Facts) -> Part | None:
    """Show the rounds on the virtual clock; None without one."""
    clock = Clock.of(run)
    if clock is None:
        return None
    rounds = [r for r in run.records if r.virtual_seconds]
    header = (
        "round",
        "virtual_seconds",
        "client_seconds",
        "wasted_seconds",
        "used",
        "late",
        "quarantined",
        "staleness",
    )
    csv = _csv(
        header,
        [
            (
                r.round_number,
                r.virtual_seconds,
                r.client_seconds,
                r.wasted_seconds,
                len(r.participants),
                len(r.late),
                len(r.quarantined),
                r.staleness,
            )
            for r in rounds
        ],
    )
    label = "Length of the rounds on the virtual clock, work of the clients, and updates used and late"
    together = charts_costs.rounds_per_bar(rounds)
    note = f"A bar is the mean of {together} rounds." if together > 1 else ""
    return Part([Chart(charts_costs.timeline(rounds), label, "timeline", csv, note)], _clock_rows(clock, facts))


def participation(run: RunView) -> Part | None:
    """Show whose updates were used; None if all equally often."""
    taken = Participation.of(run)
    if taken is None:
        return None
    examples = run.data.num_examples if run.data else None

    def of_all(use: Use) -> float | None:
        return use.examples / examples if examples and use.examples is not None else None

    csv = _csv(
        ("client", "rounds_used", "share_of_updates", "share_of_examples"),
        [(use.client, use.used, use.used / taken.updates, of_all(use)) for use in taken.uses],
    )
    svg = charts_costs.participation(taken, examples)
    never = [shorten(use.client, 24) for use in taken.uses if not use.used]
    names = ", ".join(never[:3]) + (" and others" if taken.never > 3 else "")
    rows = [
        ("Clients", f"{taken.clients:,}"),
        ("Updates used", f"{taken.updates:,}"),
        ("Rounds a client was used in", f"{taken.least:,} to {taken.most:,}"),
        ("Gini coefficient", f"{taken.gini:.2f}"),
        ("Clients never used", f"{taken.never:,}{f': {names}' if never else ''}"),
    ]
    return Part([Chart(svg, "Share of the updates used and of the examples, by client", "participation", csv)], rows)


def fairness(run: RunView, facts: Facts) -> Part | None:
    """Show the clients' results from one evaluation to the next; None where there were not two."""
    found = evaluations(run, facts)
    if len(found) < 2:
        return None
    grid = client_grid(run, facts)
    low, high = charts_clients.grid_range(grid)
    if math.isnan(low):
        return None
    by_round = _csv(
        ("round", "clients", "lowest_tenth", "median", "highest_tenth", "worst_tenth_mean", "forgetting"),
        [
            (
                e.round_number,
                e.clients,
                *map(_known, (e.spread.low, e.spread.median, e.spread.high, e.worst_tenth, e.forgetting)),
            )
            for e in found
        ],
    )
    by_client = _csv(
        ("client", *(f"round_{number}" for number in grid.rounds)),
        [(client, *map(_known, values)) for client, values in zip(grid.clients, grid.values)],
    )
    metric = shorten(facts.metric, 40)
    charts = [
        Chart(
            charts_clients.forgetting(found, facts.metric),
            f"{metric} of the clients over rounds: median, deciles and {worst_of(found[-1].clients)}; forgetting",
            "fairness",
            by_round,
        ),
        Chart(
            charts_clients.heat_of_clients(grid, facts.metric),
            f"{metric} of each client at each evaluation",
            "fairness-clients",
            by_client,
            ramp=(show_metric(facts.metric, low), show_metric(facts.metric, high)),
        ),
    ]
    last = found[-1].forgetting
    words = []
    if math.isfinite(last):
        lost = show_difference(facts.metric, last)
        words = [
            "Forgetting is how much better a client was at its own best before, as a mean over the clients: "
            f"{lost} at the last evaluation. Below zero, the clients got better."
        ]
    return Part(charts, (), words)


def drift(run: RunView) -> Part | None:
    """Show how far updates point apart; None where it was not measured."""
    rounds = drift_rounds(run.records)
    if not rounds:
        return None
    tables = [
        ("drift-cosine", "Cosine of the updates and their mean", [(r, r.cosine) for r in rounds]),
        ("drift-norm", "Norm of the updates over that of their mean", [(r, r.ratio) for r in rounds]),
    ]
    charts = [
        Chart(
            svg,
            label,
            file,
            _csv(
                ("round", "updates", "lowest_tenth", "median", "highest_tenth"),
                [(r.round_number, r.updates, *map(_known, (q.low, q.median, q.high))) for r, q in spread],
            ),
        )
        for svg, (file, label, spread) in zip(charts_clients.drift(rounds), tables)
    ]
    known = [(r.round_number, r.updates, r.diversity) for r in rounds if can_draw(r.diversity)]
    if known:
        svg = charts_clients.diversity(rounds)
        csv = _csv(("round", "updates", "diversity"), known)
        charts.append(Chart(svg, "Gradient diversity over rounds", "diversity", csv))
    return Part(charts)


def labels_and_results(run: RunView, facts: Facts) -> Part | None:
    """Show whether clients with unusual labels fare otherwise; None where too few have both figures."""
    links = client_links(run, facts)
    figures: list[tuple[str, str, Callable[[ClientLink], float]]] = [
        (facts.metric, "labels-result", lambda link: link.value),
        ("updates' mean cosine", "labels-cosine", lambda link: link.cosine),
        ("updates' mean norm ratio", "labels-norm", lambda link: link.ratio),
    ]
    charts = []
    for title, file, pick in figures:
        found = correlation(links, pick)
        if found is None or not any(can_draw(pick(link)) for link in links):
            continue
        rows = [(link.client, link.distance, pick(link)) for link in links if math.isfinite(link.distance + pick(link))]
        csv = _csv(("client", "distance_bits", file.replace("-", "_")), rows)
        svg = charts_clients.links_chart(links, pick, title, file)
        label = f"{shorten(title, 60)} over the distance of the client's labels"
        charts.append(Chart(svg, label, file, csv, link_sentence(found, shorten(title, 60))))
    return Part(charts) if charts else None


def _clock_rows(clock: Clock, facts: Facts) -> list[tuple[str, str]]:
    rows = [
        ("Whole run", show_seconds(clock.seconds)),
        ("A round: median", show_seconds(clock.median)),
        ("A round: 95th percentile", show_seconds(clock.p95)),
        (f"The longest round, {clock.longest[0]}", show_seconds(clock.longest[1])),
    ]
    if clock.client_seconds:
        wasted = f"{show_seconds(clock.wasted_seconds)} ({clock.wasted_share:.1%})"
        rows += [("Work of the clients", show_seconds(clock.client_seconds)), ("of it wasted", wasted)]
    if facts.late:
        rows.append(("Updates that were late", f"{facts.late:,} of {facts.asked:,} ({facts.late / facts.asked:.1%})"))
    if facts.staleness:
        rows.append(("Age of an update used, on average", f"{facts.staleness:.1f} rounds"))
    return rows


def _csv(header: Sequence[str], rows: Sequence[_Row]) -> str:
    return data_uri([header, *thinned(rows)])


def _known(value: float) -> float | None:
    """An empty cell for what is not known."""
    return None if math.isnan(value) else value
