"""The ClientApp: from the server's instruction to this client's update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtrain import wire
from fedtrain.client.budget import Budget
from fedtrain.client.state import ClientState
from fedtrain.compression.exchange import make_exchange
from fedtrain.data.base import FederatedData
from fedtrain.errors import BudgetError, FedtrainError, PolicyError, PrivacyError
from fedtrain.experiment.optimizers import rooted
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.importing import blame
from fedtrain.records import PERSONAL
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.registry import make_strategy
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.base import Task
from fedtrain.training.device import check_device, set_deterministic
from fedtrain.training.evaluation import evaluate
from fedtrain.training.loop import Assignment, Recipe, Trainer
from fedtrain.training.metrics.pooled import Counts, common_scaling, make_metrics
from fedtrain.training.parallel import Replicas
from fedtrain.training.schedule import round_rate

__all__ = ["CLIENT_ID", "Site", "make_client_app"]

_LOG = logging.getLogger("fedtrain.client")

CLIENT_ID = "client-id"
"""Key of the client's name in flwr's node config."""


@dataclass(frozen=True)
class Site:
    """What a process that serves clients has at hand.

    Attributes:
        base: the experiment file's folder, for a strategy of the user's own.
        states: where clients keep what lasts longer than a round.
        device: where to train.
        budget: of the clients, where each of their examples is protected.
        on_step: is called after each step of training.
    """

    base: Path
    states: ClientState
    device: torch.device
    budget: Budget | None = None
    on_step: Callable[[], None] | None = None


def make_client_app(experiment: Experiment, task: Task, data: FederatedData, site: Site) -> ClientApp:
    """Build the app that serves every client whose data this process holds.

    Args:
        experiment: what to do.
        task: model, loss and metrics.
        data: the examples of one client or of many.
        site: where to do it.
    """
    app = ClientApp()
    states, section = site.states, experiment.personalization
    strategy = make_strategy(experiment, len(data.client_ids()), site.base)
    private = tuple(section.private)
    privacy = experiment.privacy if isinstance(experiment.privacy, SamplePrivacy) else None
    # A flwr Strategy has no client half.
    recipe = Recipe(rooted(experiment.training, site.base), private=private, privacy=privacy, model=experiment.model)
    if isinstance(strategy, FederatedStrategy):
        recipe = replace(recipe, rule=strategy.local_rule, personal_rule=strategy.personal_rule)
    check_device(experiment.training, experiment.run.gpus, site.device)
    set_deterministic(experiment.run.deterministic)
    if experiment.run.gpus > 1:
        rebuild = partial(experiment_task, experiment, data.spec, site.base)
        recipe = replace(recipe, replicas=Replicas(experiment.run.gpus, rebuild))
    trainer = Trainer(task, recipe, experiment.seed, site.device, site.on_step)
    exchange = make_exchange(experiment, trainer.model)
    pooled = make_metrics(experiment.evaluation, data.spec, common_scaling(data))

    def rate(instruction: wire.Instruction) -> Callable[[float], float]:
        by_schedule = round_rate(experiment.training.schedule, instruction.round_number, experiment.rounds)
        by_server = instruction.lr_factor
        return lambda share: by_server * by_schedule(share)

    def assignment(instruction: wire.Instruction, client_id: str, before: int) -> Assignment:
        return Assignment(
            instruction.round_number,
            client_id,
            exchange.receive(instruction.params),
            instruction.shared,
            states.load(client_id, before),
            rate(instruction),
            instruction.work,
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        instruction = wire.instruction(message)
        client_id, number = str(context.node_config[CLIENT_ID]), instruction.round_number
        examples, wanted = data.client(client_id).train, assignment(instruction, client_id, number)
        receipt = ""
        if site.budget is None:
            result = trainer.train(wanted, examples)
        else:
            try:
                with site.budget.reserved(client_id, instruction, len(examples)) as reserved:
                    result = trainer.train(replace(wanted, charge=reserved.charge), examples)
                    receipt = reserved.commit(result.delta, result.extra)
            except (BudgetError, PolicyError) as error:
                _LOG.warning("%s has ended: %s", client_id, error)
                return Message(wire.ended_content(client_id), reply_to=message)
            except Exception as error:  # its text may tell of the examples, and has no noise
                _LOG.error("%s failed: %s", client_id, error if isinstance(error, FedtrainError) else blame(error))
                raise PrivacyError("the client failed; under privacy only its own log says why") from error
        sent, lost = exchange.update(result.delta, wanted.params, wanted.kept.get("lost", {}), (number, client_id))
        kept = {**result.kept, "lost": lost} if lost else result.kept
        states.save(client_id, number, kept, instruction.kept_round)
        # How many examples there are, and their loss, has no noise.
        told = (1, {}) if experiment.privacy else (result.num_examples, {"loss": result.loss})
        update = wire.Update(client_id, number, sent, *told, result.extra, receipt)
        return Message(wire.update_content(update), reply_to=message)

    @app.evaluate()
    def measure(message: Message, context: Context) -> Message:
        if experiment.privacy:
            raise PrivacyError("privacy lets no measurement on a client's examples out")
        instruction = wire.instruction(message)
        client_id, number = str(context.node_config[CLIENT_ID]), instruction.round_number
        own = data.client(client_id)
        now = assignment(instruction, client_id, number + 1)
        batch = experiment.evaluation.batch_size
        trainer.load(now.params, now.kept)
        counts = Counts(pooled)
        metrics = evaluate(trainer.model, task, own.test, batch, counts)
        sums = counts.sums if metrics else {}
        epochs = section.fine_tune_epochs if number == experiment.rounds else 0
        if metrics and (recipe.personal_rule or epochs):
            trainer.personalize(now, own.train, epochs)
            personal = evaluate(trainer.model, task, own.test, batch, counts)
            metrics |= {f"{PERSONAL}{name}": value for name, value in personal.items()}
            sums = sums | {f"{PERSONAL}{name}": values for name, values in counts.sums.items()}
        measurement = wire.Measurement(client_id, len(own.test), metrics, sums)
        return Message(wire.measurement_content(measurement), reply_to=message)

    return app
