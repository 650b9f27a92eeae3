"""What is refused before a run writes anything."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from fedtrain.data.base import Examples
from fedtrain.data.federated import PartitionedData
from fedtrain.errors import InputError
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, is_private
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.tasks.base import Task
from fedtrain.tasks.registry import check_task

__all__ = ["check_noise_fits", "check_private", "check_times", "try_task"]


def try_task(task: Task, data: PartitionedData) -> None:
    """Let a fault of the user's task show before anything is written."""
    if not len(data.dataset.targets):  # they stay with the clients, who try it themselves
        return
    largest = data.client_ids()[int(data.sizes().argmax())]
    train = data.client(largest).train
    check_task(task, Examples(train.inputs[:4], train.targets[:4]))


def check_private(patterns: tuple[str, ...], travelling: Params, left: Params) -> None:
    """Refuse private patterns that name no parameter, or leave none to train together."""
    for pattern in patterns:
        if not any(is_private(name, (pattern,)) for name in travelling):
            raise InputError(
                "no parameter of the model has such a name",
                got=f"personalization.private = {pattern}",
                expected=f"a name or pattern among {', '.join(travelling)}",
            )
    if not left:
        raise InputError(
            "personalization.private leaves nothing to train together",
            got=", ".join(patterns),
            expected=f"patterns that leave some of {', '.join(travelling)}",
        )


def check_noise_fits(experiment: Experiment, strategy: FederatedStrategy | Strategy) -> None:
    """Refuse strategies that privacy cannot stand before; of our own, the experiment has refused them already."""
    hint = "Choose a strategy of fedtrain's, such as fedavg, fedavgm, fedadam or fedprox"
    if isinstance(experiment.privacy, ClientPrivacy) and not isinstance(strategy, FederatedStrategy):
        raise InputError('privacy.unit = "client" has no noise for a flwr Strategy', hint=hint)
    personal = isinstance(strategy, FederatedStrategy) and strategy.personal_rule
    if personal and isinstance(experiment.privacy, SamplePrivacy):
        raise InputError("under privacy a strategy's personal models would train without noise", hint=hint)


def check_times(experiment: Experiment, *, live: bool, flowing: bool) -> None:
    """Refuse what needs to know how long clients take, where they take no time of their own."""
    clients = experiment.clients
    if live:
        if flowing and experiment.compression.max_bytes is not None:
            raise InputError(
                "what a round of an asynchronous server will weigh is not known beforehand",
                got="compression.max_bytes",
                hint="Leave it out, or choose a strategy in rounds, such as fedavg",
            )
        if flowing and experiment.privacy:
            raise InputError(
                "how often an asynchronous server asks a client is not known beforehand, and privacy has to count it",
                hint="Choose a strategy in rounds, such as fedavg; or simulate it, where clients.duration decides",
            )
        return
    wants = {"over_selection": clients.over_selection > 1, "deadline": clients.deadline is not None}
    wanting = "an asynchronous strategy" if flowing else next((f"clients.{key}" for key in wants if wants[key]), None)
    if wanting and clients.duration is None:
        raise InputError(
            f"{wanting} needs clients.duration: how long clients take",
            hint='Set clients.duration={kind="devices"}, or use `fedtrain server`, whose clients take their own time',
        )
