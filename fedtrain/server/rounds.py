"""The round loop: plan, instruct, gate, aggregate, evaluate, record, checkpoint.

It is ours rather than flwr's `Strategy.start`, which cannot resume, stop early or bound its waiting.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedtrain import flower, wire
from fedtrain.errors import (
    BudgetError,
    ClientEndedError,
    ClientsJoinedError,
    FedtrainError,
    InterruptedRunError,
    PrivacyError,
    RunError,
    shorten,
)
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, difference, l2_norm
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.gate import measurement_objection
from fedtrain.server.privacy import Spending
from fedtrain.server.schedule import Turn
from fedtrain.server.tally import Tally
from fedtrain.strategies.adapter import RoundStrategy
from fedtrain.training.evaluation import weighted_mean
from fedtrain.training.optimizer import lr_factor

__all__ = ["Observer", "Server"]


class Observer(Protocol):
    """Who watches a run: the terminal, a pipe, a test."""

    def round_started(self, round_number: int, clients: int) -> None:
        """So many clients were asked to train."""

    def client_finished(self, round_number: int) -> None:
        """One more of them has answered."""

    def round_finished(self, record: RoundRecord) -> None:
        """The record was written."""

    def notice(self, text: str) -> None:
        """Something that a person should know, in one line."""


@dataclass(frozen=True)
class Server:
    """Runs an experiment's rounds over a grid.

    Attributes:
        experiment: what to run.
        strategy: aggregates.
        cohort: knows the clients, by their position among the grid's nodes.
        grid: reaches the clients.
        folder: records and checkpoints go there.
        client_name: node id -> client.
        evaluate: global parameters -> loss and metrics on the central test set; empty if there is none.
        observer: is told what happens.
        spending: is charged before a round; None without privacy.
        joined: whether there are clients that the cohort does not know.
    """

    experiment: Experiment
    strategy: RoundStrategy
    cohort: Cohort
    grid: Grid
    folder: RunFolder
    client_name: Callable[[int], str]
    evaluate: Callable[[Params], dict[str, float]]
    observer: Observer
    spending: Spending | None = None
    joined: Callable[[], bool] = lambda: False

    def run(self, start: Checkpoint) -> Params:
        """Run the rounds after `start` and return the final global parameters.

        Raises:
            InterruptedRunError: at Ctrl-C or SIGTERM, after a checkpoint of the last finished round.
            ClientsJoinedError: likewise, for the run to be taken up with all clients.
            RunError: the run cannot go on; likewise.
        """
        if start.round_number:
            self.strategy.state = start.state
        self.cohort.begin(self.strategy, start.params, start.server)
        if self.spending:
            self.spending.expect(start.server.get("spending", {}))
        done = start
        saved_at = time.monotonic()
        try:
            if start.round_number == 0:
                self._record_untrained(start.params)
            for round_number in range(start.round_number + 1, self.experiment.rounds + 1):
                if self.folder.stop_wanted():
                    raise KeyboardInterrupt
                if self.joined():
                    raise ClientsJoinedError(f"clients joined after round {done.round_number}")
                turn = self.cohort.turn(round_number)
                if self._ends_before(round_number, turn):
                    break
                done = self._round(round_number, done.params, turn)
                # Under privacy a round that has to be repeated is paid for twice.
                if self.spending or time.monotonic() - saved_at >= self.experiment.run.checkpoint_seconds:
                    self.folder.write_checkpoint(done)
                    saved_at = time.monotonic()
            self.folder.write_checkpoint(done)
        except KeyboardInterrupt:
            self.folder.write_checkpoint(done)
            raise InterruptedRunError(
                f"interrupted; {done.round_number} of {self.experiment.rounds} rounds are kept",
                hint="Run the same command again to resume",
            ) from None
        except Exception:
            with contextlib.suppress(RunError):  # the first error is the one to tell
                self.folder.write_checkpoint(done)
            raise
        return done.params

    def _record_untrained(self, params: Params) -> None:
        started = time.perf_counter()
        central = self.evaluate(params) if self.experiment.evaluation.central_every else {}
        epsilon = 0.0 if self.spending else None
        seconds = time.perf_counter() - started
        self._finish(RoundRecord(round_number=0, central=central, epsilon=epsilon, seconds_evaluate=seconds))

    def _ends_before(self, round_number: int, turn: Turn) -> bool:
        """Whether the privacy budget ends the run here; else the round is on the account."""
        if self.spending is None:
            return False
        try:
            if why := self.cohort.too_few_are_left():
                self._refuse_if_nobody_took_part()
                raise BudgetError(why)
            self.spending.begin(round_number, turn.ask)
        except BudgetError as error:
            if round_number == 1:
                raise
            self.observer.notice(f"the run ends after round {round_number - 1}: {error}")
            return True
        return False

    def _refuse_if_nobody_took_part(self) -> None:
        if not any(record.participants for record in self.folder.read_rounds()):
            raise PrivacyError(
                "no client takes part: their policies or their ledgers do not allow this run",
                hint="See what they spent with `fedtrain privacy status`, and what the run asks with `fedtrain plan`",
            )

    def _round(self, round_number: int, params: Params, turn: Turn) -> Checkpoint:
        started = time.perf_counter()
        nodes = self._nodes(turn.ask)
        asked = list(self.strategy.configure(round_number, params, list(nodes)))
        late = self._nodes(turn.late)
        seen = Tally(round_number, {node: self.client_name(node) for node in asked}, list(map(self.client_name, late)))
        work = {node: turn.work[client] for node, client in nodes.items() if client in turn.work}
        messages = self._instructions(MessageType.TRAIN, params, seen, [*asked, *late], work)[: len(asked)]
        declined = len(nodes) - len(asked)
        self.observer.round_started(round_number, turn.enough or len(messages))
        valid: Iterable[tuple[int, wire.Update]]
        if turn.flowing:
            valid = self._valid(self._flowing(turn, params, seen, nodes), seen)
        else:
            replies = self._counted(turn, seen, nodes, self.grid.send_and_receive(messages))
            if turn.enough is None:
                valid = self._valid(wire.in_order(replies, asked), seen)
            else:  # who is one of the first is known only when enough have passed
                valid = sorted(self._valid(replies, seen), key=lambda passed: asked.index(passed[0]))
        arrived = ((nodes[node], update) for node, update in valid)
        updates = self._noted(self.cohort.used(turn, arrived), seen)
        new = self.strategy.aggregate(round_number, params, updates)
        read = len(seen.losses)
        if left := sum(1 for _ in updates):  # clients must have ended before the model is written over
            raise RunError("the strategy must read all updates of a round", got=f"{read} of {read + left}")
        if not turn.flowing:
            seen.note_silence()
        self.cohort.close(turn, seen.silent(nodes))
        self._set_aside(nodes, seen)
        self._check_quorum(turn.wanted - declined - len(seen.ended), seen)
        trained = time.perf_counter()
        section = self.experiment.evaluation
        central = self.evaluate(new) if self._due(round_number, section.central_every) else {}
        per_client: dict[str, dict[str, float]] = {}
        if self._due(round_number, section.clients_every):
            per_client = self._evaluate_on_clients(new, seen)
        self._finish(
            RoundRecord(
                round_number=round_number,
                participants=seen.participants,
                quarantined=seen.quarantined,
                set_aside=seen.set_aside,
                ended=seen.ended,
                late=seen.late,
                num_examples=0 if self.experiment.privacy else sum(examples for _, examples in seen.losses),
                train=weighted_mean(seen.losses),
                central=central,
                clients=_mean_over_clients(per_client),
                per_client=per_client,
                bytes_up=seen.bytes_up,
                bytes_down=seen.bytes_down,
                update_norm=l2_norm(difference(new, params)),
                lr_factor=lr_factor(self.experiment.training.schedule, round_number, self.experiment.rounds),
                epsilon=self.spending.epsilon() if self.spending else None,
                staleness=sum(seen.staleness) / max(1, len(seen.staleness)),
                virtual_seconds=turn.seconds,
                seconds_train=trained - started,
                seconds_evaluate=time.perf_counter() - trained,
            )
        )
        memory = self.cohort.memory() | ({"spending": self.spending.memory()} if self.spending else {})
        return Checkpoint(round_number, new, self.strategy.state, memory)

    def _nodes(self, clients: Sequence[int]) -> dict[int, int]:
        """Node id -> position, in the order of the positions."""
        known = self.grid.get_node_ids()
        node_ids = known if isinstance(known, Sequence) else list(known)
        return {node_ids[client]: client for client in clients}

    def _instructions(
        self, kind: str, params: Params, seen: Tally, nodes: Iterable[int], work: Mapping[int, float]
    ) -> list[Message]:
        """One message per client; all share one record of the parameters, and bytes are counted as sent."""
        arrays = flower.array_record(params)
        shared = flower.array_record(self.strategy.share()) if kind == MessageType.TRAIN else None
        kept = self.folder.oldest_checkpoint_round()
        messages = []
        for node in nodes:
            receipt = self.cohort.receipts.get(seen.names[node], "") if node in seen.names else ""
            content = wire.instruction_content(
                arrays, seen.number, shared, work=work.get(node, 1.0), kept_round=kept, receipt=receipt
            )
            seen.bytes_down += wire.size(content)
            messages.append(Message(content, node, kind, group_id=str(seen.number)))
        return messages

    def _counted(
        self, turn: Turn, seen: Tally, nodes: Mapping[int, int], replies: Iterable[Message]
    ) -> Iterator[Message]:
        """Yield replies as they come, until enough of them have passed the gate."""
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in nodes:
                continue
            seen.replied.add(node)
            self.cohort.answered(turn, nodes[node], time.perf_counter() - seen.began)
            self.observer.client_finished(seen.number)
            yield reply
            if seen.passed == turn.enough:
                return

    def _flowing(self, turn: Turn, params: Params, seen: Tally, nodes: dict[int, int]) -> Iterator[Message]:
        """Yield replies as they come, whatever round they started in; who has answered makes room for another."""
        while seen.passed != turn.enough:
            new = self._nodes(self.cohort.start(seen.number))
            under_way = self.cohort.under_way()
            for node, client in self._nodes(list(under_way)).items():
                nodes[node], seen.names[node], seen.started[node] = client, self.client_name(node), under_way[client]
            messages = self._instructions(MessageType.TRAIN, params, seen, new, {})
            reply = next(self._counted(turn, seen, nodes, self.grid.send_and_receive(messages)), None)
            if reply is None:
                return
            yield reply

    def _valid(self, replies: Iterable[Message], seen: Tally) -> Iterator[tuple[int, wire.Update]]:
        """Let through what may be aggregated, with its node; note why the others may not."""
        for reply in replies:
            node = reply.metadata.src_node_id
            client_id = seen.names[node]
            if reply.has_error() and reply.error.code == flower.CLIENT_AWAY:
                seen.late.append(client_id)
                continue
            if reply.has_error():
                seen.quarantined[client_id] = shorten(reply.error.reason, 300)
                continue
            try:
                update = wire.update(reply.content)
                seen.bytes_up += wire.size(reply.content)
            except ClientEndedError:
                seen.ended.append(client_id)
                continue
            except FedtrainError as error:
                seen.quarantined[client_id] = self.cohort.gate.refuse(client_id, error)
                continue
            if why := self.cohort.gate.objection(update, client_id, seen.started.get(node, seen.number)):
                seen.quarantined[client_id] = why
            else:
                seen.passed += 1
                if update.receipt:
                    self.cohort.receipts[client_id] = update.receipt
                yield node, update

    def _noted(self, updates: Iterable[wire.Update], seen: Tally) -> Iterator[wire.Update]:
        for update in updates:
            seen.participants.append(update.client_id)
            seen.losses.append((dict(update.metrics), update.num_examples))
            seen.staleness.append(seen.number - update.round_number)
            yield update

    def _set_aside(self, nodes: Mapping[int, int], seen: Tally) -> None:
        for client, reason in seen.quarantined.items():
            self.observer.notice(f"round {seen.number}: update of {shorten(client)} not used: {reason}")
        gone = self.cohort.gate.set_aside
        for node, client_id in seen.names.items():
            if client_id in seen.quarantined and client_id in gone:
                self.cohort.set_aside(nodes[node])
                seen.set_aside.append(client_id)
                self.observer.notice(f"{shorten(client_id)} is set aside for the rest of the run")
            elif client_id in seen.ended:
                self.cohort.end(nodes[node])
                self.observer.notice(f"{shorten(client_id)} has ended: its budget or its policy allows no more")

    def _check_quorum(self, wanted: int, seen: Tally) -> None:
        used = len(seen.participants)
        privacy = self.experiment.privacy
        # Under client privacy nobody may learn how many took part, and the noise is right for any number.
        quorum = 0.0 if privacy and privacy.unit == "client" else self.experiment.clients.quorum
        if used < wanted * quorum - 1e-9:
            late = f"{len(seen.late)} came late or did not answer"
            first = (f"{shorten(client)}: {reason}" for client, reason in seen.quarantined.items())
            raise RunError(
                f"round {seen.number} has too few valid updates",
                got=f"{used} of {wanted} clients",
                expected=f"at least clients.quorum = {quorum} of them",
                hint=next(first, late if seen.late else None),
            )
        if not used:
            what = "no valid update came in time" if wanted else "no client was drawn"
            self.observer.notice(f"round {seen.number}: {what}; the model stays as it is")

    def _evaluate_on_clients(self, params: Params, seen: Tally) -> dict[str, dict[str, float]]:
        """Each client's own numbers on its held-out examples; clients without any are left out."""
        names = {node: self.client_name(node) for node in self._nodes(self.cohort.evaluators())}
        messages = self._instructions(MessageType.EVALUATE, params, seen, names, {})
        per_client: dict[str, dict[str, float]] = {}
        for reply in wire.in_order(self.grid.send_and_receive(messages) if messages else (), names):
            client_id = names[reply.metadata.src_node_id]
            try:
                if reply.has_error():
                    raise RunError(shorten(reply.error.reason, 300))
                value = wire.measurement(reply.content)
                seen.bytes_up += wire.size(reply.content)
                if why := measurement_objection(value, client_id):
                    raise RunError(why)
            except FedtrainError as error:
                self.observer.notice(f"round {seen.number}: evaluation of {shorten(client_id)} not used: {error}")
                continue
            if value.num_examples:
                per_client[client_id] = {**value.metrics, "num_examples": value.num_examples}
        return per_client

    def _due(self, round_number: int, every: int) -> bool:
        return round_number == self.experiment.rounds or (every > 0 and round_number % every == 0)

    def _finish(self, record: RoundRecord) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = record.model_copy(update={"finished_at": now})
        self.folder.append(record)
        self.observer.round_finished(record)


def _mean_over_clients(per_client: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the held-out examples, weighted by their number."""
    weighed = ((dict(numbers), numbers["num_examples"]) for numbers in per_client.values())
    means = weighted_mean((numbers, int(weight)) for numbers, weight in weighed)
    return {name: value for name, value in means.items() if name != "num_examples"}
