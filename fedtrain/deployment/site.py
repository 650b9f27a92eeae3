"""A client's part of an offered run: its data, its model, its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp

from fedtrain.client.app import Site, make_client_app
from fedtrain.client.budget import Budget
from fedtrain.client.state import ClientState
from fedtrain.data.base import DataSpec, Examples
from fedtrain.data.federated import PartitionedData, build
from fedtrain.deployment.outbox import Outbox
from fedtrain.deployment.terms import MODEL_FILES, OWN_DATA, accepted, check_told, describe
from fedtrain.disk import sha256_of
from fedtrain.errors import DataError, InputError
from fedtrain.experiment.partitions import IidPartition, NaturalPartition
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment, RunSection
from fedtrain.link.control import Offer
from fedtrain.params import exchanged, is_private
from fedtrain.privacy.plan import SamplePlan
from fedtrain.rundir import RunFolder
from fedtrain.simulations.private import protection, requests
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.registry import check_task
from fedtrain.training.device import check_device, find_device
from fedtrain.training.loop import build_model
from fedtrain.training.optimizer import check_optimizer

__all__ = ["Assembly", "Owner", "assemble", "own_device"]


@dataclass(frozen=True)
class Owner:
    """What the owner of a client decides, whatever a server asks.

    Attributes:
        name: the client's; its certificate's where there is one.
        data: the folder of the built-in data sets, or the client's own file or folder of images.
        share: `data` holds all clients' rows, of which the experiment's partition gives this one its share.
        home: folder for what lasts: states, ledgers, finished updates.
        device: where to train: auto, cpu, cuda or cuda:N.
        policy: the policy file; None allows what is asked.
        code: own tasks, loaders and strategies that may be run.
        base: folder in which "file.py:Name" is looked for, and files that [model] names.
    """

    name: str
    data: Path
    home: Path
    share: bool = False
    device: str = "auto"
    policy: Path | None = None
    code: tuple[str, ...] = ()
    base: Path = Path()


@dataclass(frozen=True)
class Assembly:
    """What a client needs to answer the tasks of one run.

    Attributes:
        app: trains and measures.
        facts: for the server.
        outbox: of this run.
        limit: most bytes of an instruction's tensors.
        budget: what the run costs, and what the owner allows, where each example is protected.
    """

    app: ClientApp
    facts: dict[str, Any]
    outbox: Outbox
    limit: int
    budget: Budget | None = None


def assemble(owner: Owner, offer: Offer, on_step: Callable[[], None] | None = None) -> Assembly:
    """Build what an offered run needs, or say why this client takes no part.

    Args:
        owner: decides.
        offer: of the server.
        on_step: is called after each step of training.

    Raises:
        FedtrainError: the offer is wrong, the policy does not allow it, or the data do not fit.
    """
    experiment = accepted(offer, owner.code)
    folder = RunFolder(owner.home / "runs" / offer.run)
    ledgers, policy = str(owner.home.resolve() / "ledgers"), str(owner.policy.resolve()) if owner.policy else None
    here = RunSection(
        threads=experiment.run.threads,
        device=owner.device,
        deterministic=experiment.run.deterministic,
        policy=policy,
        ledgers=ledgers,
    )
    experiment = experiment.model_copy(update={"run": here})
    data = _own_data(experiment, owner)
    if isinstance(experiment.privacy, SamplePrivacy) and experiment.data.name is None and not owner.share:
        check_told(experiment.data, data.spec)
    torch.set_num_threads(experiment.run.threads)
    own = data.client(owner.name)
    train = own.train
    tried = train if len(train) else own.test  # a client that never trains
    task = experiment_task(_with_initial_values(experiment, offer, data.spec, owner.base), data.spec, owner.base)
    check_task(task, Examples(tried.inputs[:4], tried.targets[:4]))
    protects = protection(experiment, (owner.base, folder), data, data.sizes(), task)
    model = build_model(task, experiment.seed)
    check_optimizer(experiment.training, owner.base, model)
    budget = None
    if protects and isinstance(protects.plan, SamplePlan):
        request = requests(experiment, offer.run, model)
        budget = Budget(protects.plan, request, protects.ledgers, protects.policy, data)
    check_device(experiment.training, experiment.run.gpus, own_device(owner))
    site = Site(owner.base, ClientState(folder.clients), own_device(owner), budget, on_step)
    size = sum(t.numel() * t.element_size() for t in exchanged(model).values())
    # Where a server has no rows, it needs the sizes also under privacy, whose plan takes them as public.
    hidden = isinstance(experiment.privacy, SamplePrivacy) and offer.facts.get(OWN_DATA) is not True
    examples = None if hidden else len(train)
    facts = {"data": describe(data), "device": str(site.device), "num_examples": examples}
    app = make_client_app(experiment, task, data, site)
    return Assembly(app, facts, Outbox(folder.path / "outbox"), 3 * size + (1 << 20), budget)


def own_device(owner: Owner) -> torch.device:
    """Find the device to train on.

    Raises:
        InputError: this machine has none of this name.
    """
    try:
        return find_device(owner.device)
    except InputError as error:
        raise InputError(
            error.what, got=f"--device {owner.device}", expected=error.expected, hint="Use --device cpu"
        ) from error


def _with_initial_values(experiment: Experiment, offer: Offer, spec: DataSpec, base: Path) -> Experiment:
    """Find the files that initial values come from; leave them out where the server sends all values anyway.

    Raises:
        InputError: a file is needed, and is not here, or not the server's.
    """
    bare = experiment.model_copy(update={"model": experiment.model.without_files()})
    if not experiment.model.files or _is_sent_whole(bare, spec, base):
        return bare
    told = offer.facts.get(MODEL_FILES)
    for name in experiment.model.files:
        path = base / name
        where = f"Copy the server's file to {path}"
        if not path.is_file():
            raise InputError("a file of [model] is not here, and what is not trained is not sent", got=name, hint=where)
        if not isinstance(told, dict) or told.get(name) != sha256_of(path):
            raise InputError("a file of [model] is another one than the server's", got=name, hint=where)
    return experiment


def _is_sent_whole(experiment: Experiment, spec: DataSpec, base: Path) -> bool:
    """Whether a client's model is what the server sends, whatever it was before."""
    compression, private = experiment.compression, experiment.personalization.private
    if compression.down and compression.down_of == "change":
        return False
    model = build_model(experiment_task(experiment, spec, base), experiment.seed)
    sent = {name for name in exchanged(model) if not is_private(name, private)}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return sent >= tensors.keys() & model.state_dict().keys()


def _own_data(experiment: Experiment, owner: Owner) -> PartitionedData:
    """Load what this client trains on: its own file, or its share of a built-in data set.

    Raises:
        DataError: there is no such data, or no share for a client of this name.
    """
    section = experiment.data
    if section.name is not None or owner.share:
        if section.path is not None:
            section = section.model_copy(update={"path": str(owner.data.resolve())})
        data = build(section, owner.data, owner.base, experiment.seed)
        if owner.name not in data.client_ids():
            names = data.client_ids()
            raise DataError(
                f"{section.name or owner.data} has no share for this client",
                got=owner.name,
                expected=f"one of {len(names)} names, such as {names[0]}",
            )
        return data
    dropped = [*section.drop, *([section.client_column] if section.client_column else [])]
    alone = section.model_copy(
        update={
            "path": str(owner.data.resolve()),
            "client_column": None,
            "drop": dropped,
            "clients": 1,
            "partition": IidPartition(),
            "central_test": 0.0,
        }
    )
    data = build(alone, None, owner.base, experiment.seed)
    here = int(data.partition.sizes().sum())
    if isinstance(section.partition, NaturalPartition) and here < (least := section.partition.min_examples):
        raise DataError(
            "these are too few examples to take part",
            got=str(here),
            expected=f"at least data.partition.min_examples = {least} of the run",
        )
    return PartitionedData(data.dataset, replace(data.partition, names=(owner.name,)), alone, experiment.seed)
