"""When clients are there, and what a user's files tell of their devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtrain.errors import InputError, shorten
from fedtrain.experiment.clients import (
    DeviceDuration,
    DeviceFileDuration,
    DurationSection,
    FileAvailability,
    PeriodicAvailability,
)
from fedtrain.seeds import generator
from fedtrain.server.tables import read_rows, refuse_strangers

__all__ = ["Capacities", "Traces", "Windows", "files_of", "periodic_windows", "read_traces"]

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

_KBIT = 1024 / 8  # bytes: FedScale divides a message's bytes by 1024 and multiplies by 8
_LEAST_WINDOW = 1e-3  # seconds; a clock of years has steps of a ten-millionth


class Capacities(NamedTuple):
    """What a file says of each client's device."""

    computation: Floats  # (clients,) milliseconds of inference per example
    down: Floats  # (clients,) bytes per second
    up: Floats  # (clients,) bytes per second
    median: float  # of computation over the file's lines


class Windows:
    """When clients are there: half-open windows of time, which repeat where there is a period.

    Args:
        client: `(windows,)` positions.
        start: `(windows,)` seconds from the period's begin.
        end: `(windows,)` likewise, at most the period.
        count: clients that there are.
        period: seconds after which all windows repeat; infinite for never.
    """

    def __init__(self, client: Positions, start: Floats, end: Floats, count: int, period: float) -> None:
        order = np.lexsort((start, client))
        self._client, self._start, self._end = client[order], start[order], end[order]
        self._first = np.searchsorted(self._client, np.arange(count + 1))  # where each client's windows begin
        self._count, self._period = count, period

    def here(self, now: float) -> npt.NDArray[np.bool_]:
        """Tell who is there: `(clients,)`."""
        t = math.fmod(now, self._period)
        mask = np.zeros(self._count, dtype=bool)
        mask[self._client[(self._start <= t) & (t < self._end)]] = True
        return mask

    def left(self, client: int, now: float) -> float:
        """Seconds until a client has to leave; 0 for one that is not there, infinite for one that never leaves."""
        t, lines = math.fmod(now, self._period), slice(self._first[client], self._first[client + 1])
        starts, ends = self._start[lines], self._end[lines]
        at = int(np.searchsorted(starts, t, side="right")) - 1
        if at < 0 or t >= ends[at]:
            return 0.0
        left = float(ends[at]) - t
        if ends[at] == self._period and starts[0] == 0:  # it stays over the period's end
            return math.inf if len(starts) == 1 else left + float(ends[0])
        return left

    def opening(self, now: float, among: Positions) -> float:
        """The first moment from now on at which one of these clients is there; infinite if there is none."""
        wanted = np.zeros(self._count, dtype=bool)
        wanted[among] = True
        if (wanted & self.here(now)).any():
            return now
        starts, t = self._start[wanted[self._client]], math.fmod(now, self._period)
        if not len(starts):
            return math.inf
        later = starts[starts > t]
        at = now + (float(later.min()) - t if len(later) else float(starts.min()) + self._period - t)
        while at < math.inf and not (wanted & self.here(at)).any():  # the last bit of a sum may fall short
            at = math.nextafter(at, math.inf)
        return at


class Traces(NamedTuple):
    """What the files of an experiment say of its clients' devices; nothing where it names none."""

    capacities: Capacities | None = None
    windows: Windows | None = None


def periodic_windows(section: PeriodicAvailability, seed: int, count: int) -> Windows:
    """Draw when each client's share of the period begins."""
    start = generator(seed, "availability").random(count) * section.period
    end, everybody = start + section.share * section.period, np.arange(count)
    over = np.maximum(end - section.period, 0.0)  # into the next period
    if section.share == 1:
        start, end, over = np.zeros(count), np.full(count, section.period), np.zeros(count)
    late = over > 0
    return Windows(
        np.concatenate([everybody, everybody[late]]),
        np.concatenate([start, np.zeros(int(late.sum()))]),
        np.concatenate([np.minimum(end, section.period), over[late]]),
        count,
        section.period,
    )


def files_of(section: DurationSection | None) -> list[str]:
    """The files that `clients.duration` names."""
    files = [section.file] if isinstance(section, DeviceFileDuration) else []
    if isinstance(section, DeviceDuration) and isinstance(section.availability, FileAvailability):
        files.append(section.availability.file)
    return files


def read_traces(section: DurationSection | None, seed: int, base: Path, client_ids: Sequence[str]) -> Traces:
    """Read the files that `clients.duration` names.

    Args:
        section: the durations of an experiment; None without a clock.
        seed: the experiment's seed, for devices that are drawn.
        base: the experiment file's folder.
        client_ids: names, in the order of the positions.

    Raises:
        InputError: a file cannot be read, or does not fit the clients.
    """
    if not isinstance(section, DeviceDuration):
        return Traces()
    capacities = _capacities(base / section.file, seed, client_ids) if isinstance(section, DeviceFileDuration) else None
    availability = section.availability
    windows = _windows(availability, base, client_ids) if isinstance(availability, FileAvailability) else None
    return Traces(capacities, windows)


def _capacities(path: Path, seed: int, client_ids: Sequence[str]) -> Capacities:
    field = "clients.duration.file"
    rows = read_rows(path, field, ("computation", "communication"))
    if not rows:
        raise InputError(f"the file of {field} has no device", got=path)
    computation = _numbers(rows, "computation", field)
    down = _numbers(rows, "communication", field) * _KBIT
    up = _numbers(rows, "upload", field) * _KBIT if "upload" in rows[0] else down
    if "client" in rows[0]:
        names = [row["client"] for row in rows]
        lines = _lines_of(names, field, client_ids)
    else:
        lines = generator(seed, "device-file").integers(0, len(rows), len(client_ids))
    return Capacities(computation[lines], down[lines], up[lines], float(np.median(computation)))


def _lines_of(names: Sequence[str], field: str, client_ids: Sequence[str]) -> Positions:
    """The line of each client: one, and no more."""
    refuse_strangers(names, field, client_ids)
    line = {name: number for number, name in enumerate(names)}
    if twice := next((name for number, name in enumerate(names) if line[name] != number), None):
        raise InputError(f"the file of {field} has two devices for a client", got=shorten(twice))
    if missing := next((name for name in client_ids if name not in line), None):
        hint = "Give each client a line, or leave out the column client, and devices are drawn"
        raise InputError(f"the file of {field} has no device for a client", got=shorten(missing), hint=hint)
    return np.array([line[name] for name in client_ids])


def _windows(section: FileAvailability, base: Path, client_ids: Sequence[str]) -> Windows:
    field = "clients.duration.availability.file"
    rows = read_rows(base / section.file, field, ("client", "start", "end"))
    refuse_strangers((row["client"] for row in rows), field, client_ids)
    period = section.period or math.inf
    start, end = (_numbers(rows, column, field, least=0.0) for column in ("start", "end"))
    for row, first, last in zip(rows, start, end, strict=True):
        if not (first + _LEAST_WINDOW <= last <= period):
            until = f" and within availability.period = {period:g}" if section.period else ""
            raise InputError(
                f"the file of {field} has a window of no use",
                got=f"{shorten(row['client'])}: {first:g} to {last:g}",
                expected=f"an end after the start{until}",
            )
    position = {name: number for number, name in enumerate(client_ids)}
    merged = _merged(zip((position[row["client"]] for row in rows), start.tolist(), end.tolist(), strict=True))
    client, start, end = (np.array(column) for column in zip(*merged, strict=True)) if merged else (np.empty(0),) * 3
    return Windows(client.astype(np.int64), start, end, len(client_ids), period)


def _merged(windows: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Join a client's windows that touch or overlap."""
    merged: list[tuple[int, float, float]] = []
    for client, start, end in sorted(windows):
        if merged and merged[-1][0] == client and start <= merged[-1][2]:
            merged[-1] = (client, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((client, start, end))
    return merged


def _numbers(rows: Sequence[Mapping[str, str]], column: str, field: str, least: float | None = None) -> Floats:
    """A column as numbers: above 0, or from `least` on."""
    values = []
    for number, row in enumerate(rows, 2):
        try:
            value = float(row[column])
        except ValueError:
            value = math.nan
        if not ((value > 0 if least is None else value >= least) and math.isfinite(value)):
            raise InputError(
                f"the file of {field} has no valid number in line {number}, column {column}",
                got=shorten(row[column].strip()) or "nothing",
                expected="a number greater than 0" if least is None else f"a number from {least:g}",
            )
        values.append(value)
    return np.array(values, dtype=np.float64)
