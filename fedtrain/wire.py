"""What travels: instructions and updates, to and from flwr's RecordDict. The only place that knows the keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedtrain import flower
from fedtrain.errors import ClientEndedError, RunError, shorten
from fedtrain.params import Params

__all__ = [
    "Instruction",
    "Measurement",
    "Update",
    "ended_content",
    "in_order",
    "instruction",
    "instruction_content",
    "measurement",
    "measurement_content",
    "size",
    "update",
    "update_content",
]

# The names that flwr's own strategies look for.
_ARRAYS, _CONFIG, _METRICS = "arrays", "config", "metrics"
_ROUND, _CLIENT, _EXAMPLES = "server-round", "client-id", "num-examples"
_SHARED, _EXTRA, _WORK, _KEPT_ROUND = "shared", "extra", "work", "kept-round"
_SUMS = "sums"
_ENDED, _RECEIPT, _LR_FACTOR = "ended", "receipt", "lr-factor"
_NUMBER = 8  # bytes


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a client: data only."""

    round_number: int
    params: Params  # the global model's exchanged tensors
    shared: Params = field(default_factory=dict)  # what the strategy sends beside: `Algorithm.share`
    work: float = 1.0  # share of its local steps that the client has time for
    kept_round: int = 0  # the server will not go back before this round
    receipt: str = ""  # the last that this client sent, for its ledger to be held against
    lr_factor: float = 1.0  # of the learning rate, beside that of its schedule


@dataclass(frozen=True)
class Update:
    """What a client returns from training."""

    client_id: str
    round_number: int
    delta: Params  # client minus server
    num_examples: int  # 1 under privacy, which does not tell
    metrics: Mapping[str, float] = field(default_factory=dict)  # "loss": mean while training; none under privacy
    extra: Params = field(default_factory=dict)  # what the strategy needs beside: `Algorithm.extra`
    receipt: str = ""  # head of the client's privacy ledger: a SHA-256 in hex, which tells nothing of its entries


@dataclass(frozen=True)
class Measurement:
    """What a client returns from evaluating on its held-out examples."""

    client_id: str
    num_examples: int
    metrics: Mapping[str, float]
    sums: Params = field(default_factory=dict)  # what `PooledMetrics` needs: float64


def instruction(message: Message) -> Instruction:
    """Read the server's message."""
    content = message.content
    config = _config(content)
    shared = _arrays(content, _SHARED)
    return Instruction(
        round_number=_integer(config, _ROUND),
        params=flower.tensors(_needed(_arrays(content, _ARRAYS), content)),
        shared=flower.tensors(shared) if shared is not None else {},
        work=_fraction(config, _WORK) if _WORK in config else 1.0,  # flwr's own servers do not know these two
        kept_round=_integer(config, _KEPT_ROUND) if _KEPT_ROUND in config else 0,
        receipt=_receipt(config),
        lr_factor=_positive(config, _LR_FACTOR) if _LR_FACTOR in config else 1.0,
    )


def instruction_content(
    arrays: ArrayRecord,
    round_number: int,
    shared: ArrayRecord | None = None,
    *,
    work: float = 1.0,
    kept_round: int = 0,
    receipt: str = "",
    lr_factor: float | None = None,
) -> RecordDict:
    """Write an instruction; each message gets a RecordDict of its own around the shared arrays."""
    config = ConfigRecord({_ROUND: round_number, _WORK: work, _KEPT_ROUND: kept_round})
    if receipt:
        config[_RECEIPT] = receipt
    if lr_factor is not None:
        config[_LR_FACTOR] = lr_factor
    content = RecordDict({_ARRAYS: arrays, _CONFIG: config})
    if shared:
        content[_SHARED] = shared
    return content


def update_content(value: Update) -> RecordDict:
    """Write a client's update."""
    content = RecordDict(
        {
            _ARRAYS: flower.array_record(value.delta),
            _METRICS: MetricRecord({_EXAMPLES: value.num_examples, **value.metrics}),
            _CONFIG: ConfigRecord({_CLIENT: value.client_id, _ROUND: value.round_number}),
        }
    )
    if value.receipt:
        _config(content)[_RECEIPT] = value.receipt
    if value.extra:
        content[_EXTRA] = flower.array_record(value.extra)
    return content


def ended_content(client_id: str) -> RecordDict:
    """Write that a client takes no further part: all that a server learns of a budget or a policy."""
    return RecordDict({_CONFIG: ConfigRecord({_CLIENT: client_id, _ENDED: True})})


def update(content: RecordDict) -> Update:
    """Read a client's update.

    Raises:
        ClientEndedError: the client says that it takes no further part.
        RunError: a record is missing or of the wrong kind; the values are checked by the gate.
    """
    config = _config(content)
    if config.get(_ENDED) is True:
        raise ClientEndedError("the client has ended: it takes no further part in this run")
    metrics = _metrics(content)
    delta, extra = _needed(_arrays(content, _ARRAYS), content), _arrays(content, _EXTRA)
    return Update(
        client_id=_text(config, _CLIENT),
        round_number=_integer(config, _ROUND),
        delta=flower.tensors(delta),
        num_examples=_integer(metrics, _EXAMPLES),
        metrics=_numbers(metrics),
        extra=flower.tensors(extra) if extra is not None else {},
        receipt=_receipt(config),
    )


def measurement_content(value: Measurement) -> RecordDict:
    """Write a client's measurement."""
    content = RecordDict(
        {
            _METRICS: MetricRecord({_EXAMPLES: value.num_examples, **value.metrics}),
            _CONFIG: ConfigRecord({_CLIENT: value.client_id}),
        }
    )
    if value.sums:
        content[_SUMS] = flower.array_record(value.sums)
    return content


def measurement(content: RecordDict) -> Measurement:
    """Read a client's measurement.

    Raises:
        RunError: as `update`.
    """
    metrics, sums = _metrics(content), _arrays(content, _SUMS)
    return Measurement(
        _text(_config(content), _CLIENT),
        _integer(metrics, _EXAMPLES),
        _numbers(metrics),
        flower.tensors(sums) if sums is not None else {},
    )


def size(content: RecordDict) -> int:
    """Bytes of a message's content on the wire, which depend on names, shapes and dtypes but on no number's value.

    Raw tensor data, and for each tensor its name and 8 bytes per dimension and for its dtype; the key of each other
    value and 8 bytes per number, or its text.
    """
    total = 0
    for key, record in content.items():
        total += len(key.encode())
        for name, value in record.items():
            total += len(str(name).encode())
            total += _array_size(value) if isinstance(value, Array) else _value_size(value)
    return total


def in_order(replies: Iterable[Message], node_ids: Iterable[int]) -> Iterator[Message]:
    """Yield replies in the order of `node_ids`, whatever the order of arrival.

    Holds back those that came early. What never came is skipped once the others have ended; a second reply of one node
    and a reply of a node that was not asked are dropped.
    """
    expected = list(node_ids)
    early: dict[int, Message] = {}
    position = 0
    wanted = set(expected)
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in wanted:
            continue
        wanted.discard(node)
        early[node] = reply
        while position < len(expected) and expected[position] in early:
            yield early.pop(expected[position])
            position += 1
    for node in expected[position:]:
        if node in early:
            yield early.pop(node)


def _array_size(array: Array) -> int:
    tensor = flower.tensor(array)
    return tensor.numel() * tensor.element_size() + _NUMBER * (1 + tensor.ndim)


def _value_size(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_value_size, value))
    return len(value.encode() if isinstance(value, str) else value) if isinstance(value, str | bytes) else _NUMBER


# flwr's `content.array_records` and its like keep a view that points back to the content: a circle, in which each reply
# would stay in memory until the garbage collector comes by.


def _arrays(content: RecordDict, key: str) -> ArrayRecord | None:
    record = content.get(key)
    return record if isinstance(record, ArrayRecord) else None


def _needed(record: ArrayRecord | None, content: RecordDict) -> ArrayRecord:
    if record is None:
        raise RunError("the message carries no arrays", got=sorted(content))
    return record


def _config(content: RecordDict) -> ConfigRecord:
    record = content.get(_CONFIG)
    if not isinstance(record, ConfigRecord):
        raise RunError("the message carries no config record", got=sorted(content))
    return record


def _metrics(content: RecordDict) -> MetricRecord:
    record = content.get(_METRICS)
    if not isinstance(record, MetricRecord):
        raise RunError("the reply carries no metrics record", got=sorted(content))
    return record


def _integer(record: ConfigRecord | MetricRecord, key: str) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RunError(f"{key!r} is wrong", got=repr(value), expected="an integer")
    return value


def _fraction(record: ConfigRecord, key: str) -> float:
    value = record.get(key)
    if not isinstance(value, float) or not 0 < value <= 1:
        raise RunError(f"{key!r} is wrong", got=value, expected="a number greater than 0 and at most 1")
    return value


def _positive(record: ConfigRecord, key: str) -> float:
    value = record.get(key)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise RunError(f"{key!r} is wrong", got=value, expected="a finite number greater than 0")
    return value


def _receipt(record: ConfigRecord) -> str:
    value = record.get(_RECEIPT, "")
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{64})?", value):
        raise RunError(f"{_RECEIPT!r} is wrong", got=value, expected="a SHA-256 in hex, or nothing")
    return value


def _text(record: ConfigRecord, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RunError(f"{key!r} is wrong", got=value, expected="a text")
    return value


def _numbers(record: MetricRecord) -> dict[str, float]:
    numbers = {}
    for name, value in record.items():
        if isinstance(value, list):
            raise RunError(f"metric {shorten(name)} is wrong", got=value, expected="a number")
        if name != _EXAMPLES:
            try:
                numbers[name] = float(value)
            except OverflowError as error:  # an integer of hundreds of digits
                raise RunError(f"metric {shorten(name)} is wrong", got=value, expected="a number") from error
    return numbers
