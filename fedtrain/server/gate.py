"""The gate: what an update must satisfy before it may touch the model."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from fedtrain.errors import RunError, shorten
from fedtrain.experiment.gate import GateSection
from fedtrain.params import Params, l2_norm
from fedtrain.training.metrics.pooled import NONE, PooledMetrics
from fedtrain.wire import Measurement, Update

__all__ = ["Gate", "looks_diverged", "measurement_objection"]

_WINDOW, _ENOUGH = 100, 5  # accepted updates that a median or mean is taken over, at most and at least
_MOST_GROWTH = 100.0  # times the model's scale: an update that is larger is no training, whatever the others send
_LEAST_STEP = 1e-6  # control variates are deltas divided by learning rate times steps
_MOST_EXAMPLES, _MOST_METRICS, _MOST_NAME = 10**9, 100, 100  # of a measurement
_REASON = 300  # characters

_Schema = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Gate:
    """Judges updates one after another, in client order; what it accepts is the measure of those that follow.

    Args:
        section: the limits.
        model: the global parameters, whose names, shapes and dtypes every delta must have.
        extra: likewise for `Update.extra`.
        memory: what `memory()` gave, in a run that is resumed.
        metrics: names of the metrics that an update must bring.
        also: the algorithm's own objection; it sees only what has passed all else.
    """

    def __init__(
        self,
        section: GateSection,
        model: Params,
        extra: Params,
        memory: Mapping[str, Any] | None = None,
        *,
        metrics: Collection[str] = ("loss",),
        also: Callable[[Update], str | None] = lambda _: None,
    ) -> None:
        self._section, self._metrics, self._also = section, frozenset(metrics), also
        self._model, self._extra = _schema(model), _schema(extra)
        self._size = sum(t.numel() for t in model.values())
        # Single numbers, such as a loss or a count of steps, have no scale that the gate could know.
        self._extra_has_scale = any(t.numel() > 1 for t in extra.values())
        if not memory:
            scale = l2_norm(model) + math.sqrt(self._size)
            memory = {"scale": scale, "norms": [], "extra_norms": [], "examples": [], "offences": {}}
        # Of the initial parameters, once and for all: a resumed run judges alike, and no round reads the model for it.
        self._scale: float = memory["scale"]
        self._norms = _Accepted(section.norm_factor, memory["norms"])
        self._extra_norms = _Accepted(section.norm_factor, memory["extra_norms"])
        # A mean: where sizes are very uneven, the largest client is far from the median, but has its part in the mean.
        self._examples = _Accepted(section.examples_factor, memory["examples"], statistics.fmean)
        self._offences: dict[str, int] = dict(memory["offences"])

    def objection(self, update: Update, client_id: str, round_number: int) -> str | None:
        """Say why an update must not be used, in one line; None if it may.

        It reads each tensor once. An objection counts as an offence of the client that was asked, unless the client may
        be honest: it has very many examples, or nothing left to learn.

        Args:
            update: as the client sent it.
            client_id: the client that was asked.
            round_number: the round it was asked for.
        """
        try:
            norm, extra_norm = self._check(update, client_id, round_number)
        except _DoubtError as error:
            return shorten(str(error), _REASON)
        except RunError as error:
            return self.refuse(client_id, error)
        self._norms.add(norm)
        self._extra_norms.add(extra_norm)
        self._examples.add(update.num_examples)
        return None

    def refuse(self, client_id: str, why: object) -> str:
        """Count an offence, such as a reply that cannot be read; return the reason in one printable line."""
        self._offences[client_id] = self._offences.get(client_id, 0) + 1
        return shorten(str(why), _REASON)

    @property
    def set_aside(self) -> set[str]:
        """The clients that have reached `max_offences`."""
        most = self._section.max_offences
        return {client for client, count in self._offences.items() if 0 < most <= count}

    def memory(self) -> dict[str, Any]:
        """What the gate remembers, as lists and mappings of numbers: a gate made from it goes on as this one would."""
        return {
            "scale": self._scale,
            "norms": list(self._norms.values),
            "extra_norms": list(self._extra_norms.values),
            "examples": list(self._examples.values),
            "offences": dict(self._offences),
        }

    def _check(self, update: Update, client_id: str, round_number: int) -> tuple[float, float]:
        """Return the norms of the delta and of the extra tensors, or raise RunError."""
        if update.client_id != client_id:
            got = update.client_id[:_REASON]  # it may be megabytes
            raise RunError("the update names another client", got=got, expected=shorten(client_id))
        if update.round_number != round_number:
            raise RunError("the update is for another round", got=update.round_number, expected=str(round_number))
        self._check_examples(update.num_examples)
        if update.metrics.keys() != self._metrics:
            raise RunError("the metrics are wrong", got=_listed(update.metrics), expected=_listed(self._metrics))
        for name, value in update.metrics.items():
            if not math.isfinite(value):
                raise RunError(f"the {name} is wrong", got=value, expected="a finite number")
        norm = _norm("tensor", update.delta, self._model)
        extra_norm = _norm("extra tensor", update.extra, self._extra)
        if self._size and not norm:
            raise _DoubtError("the update is zero throughout")
        if self._section.norm_factor:
            most = _MOST_GROWTH * self._scale
            _check_norm("update's L2 norm", norm, min(most, self._norms.limit()))
            if self._extra_has_scale:
                _check_norm("extra tensors' L2 norm", extra_norm, min(most / _LEAST_STEP, self._extra_norms.limit()))
        if why := self._also(update):
            raise RunError(why)
        return norm, extra_norm

    def _check_examples(self, number: int) -> None:
        most = self._section.max_examples
        if type(number) is not int or not 1 <= number <= most:  # True is an int to isinstance
            raise RunError("num_examples is wrong", got=repr(number), expected=f"an integer from 1 to {most}")
        if number > self._examples.limit():
            limit = f"at most {self._examples.limit():g} (gate.examples_factor)"
            raise _DoubtError("num_examples is out of all proportion to other clients'", got=number, expected=limit)


class _DoubtError(RunError):
    """An update that is not used, of a client that may be honest."""


class _Accepted:
    """The last accepted values of one kind, and their middle: a median, or a mean."""

    def __init__(
        self, factor: float, values: Iterable[float], middle: Callable[[Iterable[float]], float] = statistics.median
    ) -> None:
        self._factor, self._middle = factor, middle
        self.values = deque(values, maxlen=_WINDOW)

    def add(self, value: float) -> None:
        self.values.append(value)

    def limit(self) -> float:
        """How large another may be: `factor` times the middle, where there are enough for one and it is not 0."""
        middle = self._middle(self.values) if len(self.values) >= _ENOUGH else 0.0
        return self._factor * middle or math.inf


def looks_diverged(reason: str) -> bool:
    """Whether an objection is one to numbers without bounds, as all clients send them where training diverges."""
    return any(words in reason for words in ("a finite number", "NaN, infinite or immense", "L2 norm is out of all"))


def measurement_objection(measurement: Measurement, client_id: str, pooled: PooledMetrics = NONE) -> str | None:
    """Say why a client's measurement must not be used, in one line; None if it may.

    A diverged model gives infinite losses everywhere, which is worth knowing; a NaN tells nothing and spoils the mean.

    Args:
        measurement: as the client sent it.
        client_id: the client that was asked.
        pooled: the metrics whose sums it must bring.
    """
    number, metrics = measurement.num_examples, measurement.metrics
    if measurement.client_id != client_id:
        return f"it names another client: got {shorten(measurement.client_id)}; expected {shorten(client_id)}"
    if type(number) is not int or not 0 <= number <= _MOST_EXAMPLES:
        return f"num_examples is {shorten(number)}; expected an integer from 0 to {_MOST_EXAMPLES}"
    if len(metrics) > _MOST_METRICS:
        return f"it holds {len(metrics)} metrics; expected at most {_MOST_METRICS}"
    if odd := [name for name in metrics if len(name) > _MOST_NAME or not name.isprintable()]:
        return f"metric {shorten(odd[0])}: expected a printable name of at most {_MOST_NAME} characters"
    odd = [name for name, value in metrics.items() if math.isnan(value)]
    if odd:
        return f"{shorten(', '.join(odd))} is not a number"
    return pooled.objection(measurement.sums, number)


def _schema(params: Params) -> _Schema:
    return {name: (t.dtype, tuple(t.shape)) for name, t in params.items()}


def _norm(kind: str, params: Params, schema: _Schema) -> float:
    """L2 norm over all tensors; RunError if they are not those of the schema, or not finite."""
    if params.keys() != schema.keys():
        lacks, more = _listed(schema.keys() - params.keys()), _listed(params.keys() - schema.keys())
        raise RunError(f"the {kind}s are not those asked for", got=f"without {lacks}; with {more}")
    for name, (dtype, shape) in schema.items():
        t = params[name]
        if t.dtype != dtype or t.shape != shape:
            got = f"{t.dtype} {tuple(t.shape)}"
            raise RunError(f"{kind} {shorten(name)} is of the wrong kind", got=got, expected=f"{dtype} {shape}")
    norm = l2_norm(params)
    if not math.isfinite(norm):
        odd = [name for name, t in params.items() if not math.isfinite(l2_norm({name: t}))]
        raise RunError(f"the {kind}s hold NaN, infinite or immense values", got=_listed(odd))
    return norm


def _listed(names: Iterable[str]) -> str:
    names = sorted(name[:_REASON] for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _check_norm(what: str, norm: float, limit: float) -> None:
    if norm > limit:
        most = f"at most {limit:.3g} (gate.norm_factor)"
        raise RunError(f"the {what} is out of all proportion", got=f"{norm:.3g}", expected=most)
