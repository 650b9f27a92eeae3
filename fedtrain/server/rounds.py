"""The round loop: plan, instruct, gate, aggregate, evaluate, record, checkpoint.

It is ours rather than flwr's `Strategy.start`, which cannot resume, stop early or bound its waiting.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedtrain import flower, wire
from fedtrain.errors import (
    BudgetError,
    ClientEndedError,
    ClientsJoinedError,
    FedtrainError,
    InputError,
    InterruptedRunError,
    PrivacyError,
    RunError,
    shorten,
)
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, l2_norm
from fedtrain.records import Histogram, RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.drift import Drift, Sketcher
from fedtrain.server.gate import looks_diverged
from fedtrain.server.mail import Mail
from fedtrain.server.measuring import Measuring
from fedtrain.server.observer import Observer
from fedtrain.server.prices import ByteBudget, due
from fedtrain.server.privacy import Spending
from fedtrain.server.result import Result
from fedtrain.server.schedule import Turn
from fedtrain.server.tally import Tally
from fedtrain.strategies.adapter import RoundStrategy
from fedtrain.training.schedule import lr_factor

__all__ = ["Server"]


@dataclass(frozen=True)
class Server:
    """Runs an experiment's rounds over a grid.

    Attributes:
        experiment: what to run.
        strategy: aggregates.
        cohort: knows the clients, by their position among the grid's nodes.
        grid: reaches the clients.
        folder: records and checkpoints go there.
        evaluate: global parameters -> loss and metrics on the central test set; empty if there is none.
        observer: is told what happens.
        mail: writes and reads messages.
        spending: is charged before a round; None without privacy.
        byte_budget: of the run; None for no limit.
        sketcher: for the drift of clients; None where it is not looked at.
        joined: whether there are clients that the cohort does not know.
        confusion: the confusion matrix of the model that `evaluate` measured last; empty where it is not asked for.
        look: (parameters after a round, before it) -> histograms, every run.histograms_every rounds.
    """

    experiment: Experiment
    strategy: RoundStrategy
    cohort: Cohort
    grid: Grid
    folder: RunFolder
    evaluate: Callable[[Params], dict[str, float]]
    observer: Observer
    mail: Mail
    spending: Spending | None = None
    byte_budget: ByteBudget | None = None
    sketcher: Sketcher | None = None
    joined: Callable[[], bool] = lambda: False
    confusion: Callable[[], list[list[int]]] = list
    look: Callable[[Params, Params], Mapping[str, Histogram]] | None = None

    @cached_property
    def result(self) -> Result:
        """Which model is the run's result, and why the run ended."""
        return Result(self.experiment)

    def run(self, start: Checkpoint) -> Params:
        """Run the rounds after `start` and return the result: the last model, the best one, or an average.

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
        before = self.folder.read_rounds() if start.round_number else []  # the untrained model is measured again
        self.result.begin(start, (record for record in before if record.round_number <= start.round_number))
        done = start
        saved_at = time.monotonic()
        try:
            if start.round_number == 0:
                self._record_untrained(start.params)
            for round_number in range(start.round_number + 1, self.experiment.rounds + 1):
                if why := self.result.out_of_patience():
                    self._end_after(round_number - 1, why)
                    break
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
        return self.result.params

    def _record_untrained(self, params: Params) -> None:
        started = time.perf_counter()
        central = self.evaluate(self.result.take(0, params)) if self.experiment.evaluation.central_every else {}
        self.result.watch({"central": central})
        epsilon = 0.0 if self.spending else None
        seconds = time.perf_counter() - started
        self._finish(RoundRecord(round_number=0, central=central, epsilon=epsilon, seconds_evaluate=seconds))

    def _ends_before(self, round_number: int, turn: Turn) -> bool:
        """Whether a budget, of bytes or of privacy, ends the run here; else the round is on the account."""
        if why := self._too_many_bytes(round_number, turn):
            if round_number == 1:
                raise InputError(f"the first round is more than the byte budget allows: {why}", hint="Set it higher")
            self._end_after(round_number - 1, why)
            return True
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
            self._end_after(round_number - 1, str(error))
            return True
        return False

    def _end_after(self, round_number: int, why: str) -> None:
        self.result.ended = why
        self.observer.notice(f"the run ends after round {round_number}: {why}")

    def _too_many_bytes(self, round_number: int, turn: Turn) -> str | None:
        if self.byte_budget is None:
            return None
        evaluators, names = self.cohort.evaluators(), self.mail.client_name
        if self.result.may_end:  # then clients measure its result
            round_number = self.experiment.rounds
        price = self.mail.prices.round(round_number, turn, evaluators, lambda client: names(*self._nodes([client])))
        return self.byte_budget.objection(sum(price))

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
        name = self.mail.client_name
        seen = Tally(round_number, {node: name(node) for node in asked}, list(map(name, late)))
        if self.sketcher:
            seen.drift = Drift(self.sketcher)
        work = {node: turn.work[client] for node, client in nodes.items() if client in turn.work}
        messages = self._instructions(params, seen, [*asked, *late], work)[: len(asked)]
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
        measured = self._measured(self.result.take(round_number, new), seen)
        factor = lr_factor(self.experiment.training.schedule, round_number, self.experiment.rounds)
        record = seen.record(self.experiment.privacy).model_copy(
            update={
                **measured,
                "update_norm": l2_norm(new, params),
                "lr_factor": factor * (self.result.lr_factor or 1.0),
                "epsilon": self.spending.epsilon() if self.spending else None,
                "virtual_seconds": turn.seconds,
                "client_seconds": turn.client_seconds,
                "wasted_seconds": turn.wasted_seconds,
                "seconds_train": trained - started,
                "seconds_evaluate": time.perf_counter() - trained,
            }
        )
        every = self.experiment.run.histograms_every
        if self.look and every and round_number % every == 0:
            self.folder.write_histograms(round_number, self.look(new, params))
        self._finish(record)
        memory = self.cohort.memory() | ({"spending": self.spending.memory()} if self.spending else {})
        return Checkpoint(round_number, new, self.strategy.state, memory, self.result.memory())

    def _instructions(
        self, params: Params, seen: Tally, nodes: Iterable[int], work: Mapping[int, float]
    ) -> list[Message]:
        """Ask clients to train, at the learning rate that the run's measurements have led to."""
        mail = replace(self.mail, lr_factor=self.result.lr_factor)
        return mail.instructions(MessageType.TRAIN, params, seen, nodes, work)

    def _nodes(self, clients: Sequence[int]) -> dict[int, int]:
        """Node id -> position, in the order of the positions."""
        known = self.grid.get_node_ids()
        node_ids = known if isinstance(known, Sequence) else list(known)
        return {node_ids[client]: client for client in clients}

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
                nodes[node], seen.names[node], seen.started[node] = (
                    client,
                    self.mail.client_name(node),
                    under_way[client],
                )
            messages = self._instructions(params, seen, new, {})
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
                update = self.mail.update(reply, client_id, seen)
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
            if seen.drift:
                seen.drift.add(update.client_id, update.delta)
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
            first = next((f"{shorten(client)}: {reason}" for client, reason in seen.quarantined.items()), None)
            if first and all(map(looks_diverged, seen.quarantined.values())):
                first += (
                    "; if training diverges, lower training.optimizer.lr: see `fedtrain lr-find` and `fedtrain check`"
                )
            raise RunError(
                f"round {seen.number} has too few valid updates",
                got=f"{used} of {wanted} clients",
                expected=f"at least clients.quorum = {quorum} of them",
                hint=first or (late if seen.late else None),
            )
        if not used:
            what = "no valid update came in time" if wanted else "no client was drawn"
            self.observer.notice(f"round {seen.number}: {what}; the model stays as it is")

    def _measured(self, model: Params, seen: Tally) -> dict[str, Any]:
        """Measure a round's model; in the round that ends the run, what is not watched measures the run's result."""
        section, rounds, result = self.experiment.evaluation, self.experiment.rounds, self.result
        every = {"central": section.central_every, "clients": section.clients_every}
        first, second = sorted(every, key=lambda part: part != result.watched)
        found = self._measure(first, model, seen) if due(seen.number, every[first], rounds) else {}
        result.watch(found)
        last = seen.number == rounds or result.out_of_patience() is not None
        if last and result.restores:
            model = result.params
            found["result_round"] = result.round_number
        if last or due(seen.number, every[second], rounds):
            found |= self._measure(second, model, seen)
        return found

    def _measure(self, part: str, model: Params, seen: Tally) -> dict[str, Any]:
        if part == "central":
            return {"central": self.evaluate(model), "central_confusion": self.confusion()}
        names = {node: self.mail.client_name(node) for node in self._nodes(self.cohort.evaluators())}
        measured = Measuring(self.grid, self.mail, self.observer.notice).clients(model, names, seen)
        confusion = {"clients_confusion": measured.confusion}
        return {"clients": measured.pooled, "per_client": measured.per_client, **confusion}

    def _finish(self, record: RoundRecord) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = record.model_copy(update={"finished_at": now})
        self.folder.append(record)
        if self.byte_budget:
            self.byte_budget.note(record)
        self.result.note(record)
        self.observer.round_finished(record)
