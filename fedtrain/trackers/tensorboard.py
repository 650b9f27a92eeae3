"""TensorBoard: event files in the run's folder, under `tensorboard/`."""

from __future__ import annotations

from collections.abc import Mapping

from fedtrain.records import Histogram
from fedtrain.trackers.base import TrackedRun, now

__all__ = ["TensorBoard"]

_PREFIX = "events.out.tfevents."


class TensorBoard:
    """Writes one event file per start of the run; see `Tracker`.

    The records are written here rather than by torch's SummaryWriter, whose thread would tell of a full disk by a
    traceback of its own.

    Args:
        run: to show.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, and a clock may have been set back.
        numbers = [path.name.removeprefix(_PREFIX) for path in folder.iterdir()]
        number = 1 + max((int(text) for text in numbers if text.isdecimal()), default=0)
        self._records = RecordWriter((folder / f"{_PREFIX}{number:06}").open("xb"))
        self._next_round = -1
        self._write(file_version="brain.Event:2")

    def log(self, numbers: Mapping[str, float], round_number: int) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._next_round != round_number:  # the run starts or goes back: forget what came after
            self._write(step=round_number, session_log=SessionLog(status=SessionLog.START))
        self._next_round = round_number + 1
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(step=round_number, summary=Summary(value=values))
        self._records.flush()

    def look(self, found: Mapping[str, Histogram], round_number: int) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        values = [
            Summary.Value(
                tag=tag,
                histo=HistogramProto(
                    min=one.edges[0],
                    max=one.edges[-1],
                    num=sum(one.counts),
                    sum=one.total,
                    sum_squares=one.squares,
                    bucket_limit=one.edges[1:],
                    bucket=one.counts,
                ),
            )
            for tag, one in found.items()
        ]
        self._write(step=round_number, summary=Summary(value=values))
        self._records.flush()

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._records.close()

    def _write(self, **content: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=now(), **content).SerializeToString())
