"""What a run on a Flower fleet is told: the run config by who submits it, and each SuperNode's config by who starts it.

The run config reaches every SuperNode, which takes no path from there: where a client's data lie, and where it keeps
what lasts longer than a round, its own config says.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from flwr.app import ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtrain.errors import InputError
from fedtrain.experiment.sections import Experiment

__all__ = ["NodeSettings", "RunSettings"]


_NODE = "node"  # key of the record by which a node says whose it is


class _Settings(BaseModel):
    """Flat, for so flwr's configs are, with dashes in the keys."""

    model_config = ConfigDict(
        frozen=True, alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True, extra="ignore"
    )

    @classmethod
    def of(cls, config: Mapping[str, bool | float | str]) -> Self:
        """Read a config of flwr's.

        Raises:
            InputError: a value is wrong.
        """
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"{'.'.join(map(str, fault['loc']))} is wrong in the config of flwr"
            raise InputError(what, got=fault["input"], expected=fault["msg"]) from error

    def config(self) -> dict[str, bool | float | str]:
        """Write a config of flwr's, without what is None."""
        return self.model_dump(by_alias=True, exclude_none=True)


class RunSettings(_Settings):
    """The run config.

    Attributes:
        experiment: the resolved experiment, in TOML.
        base: folder against which the server resolves the experiment's paths.
        out: the run's folder, on the SuperLink's machine.
        data_root: folder of the built-in data sources there.
        mark: tells what clients keep in this run from what they keep in others; "" where they serve this run alone.
        wait: seconds to wait for SuperNodes of all clients before the first round.
        patience: seconds that a round waits for replies in all.
    """

    experiment: str
    base: str
    out: str
    data_root: str | None = None
    mark: str = Field(default="", pattern=r"^([0-9a-f]{32})?$")
    wait: float = 60.0
    patience: float = 3600.0

    def read_experiment(self) -> Experiment:
        """Read the experiment.

        Raises:
            InputError: it is none for this version of fedtrain.
        """
        try:
            return Experiment.model_validate(tomllib.loads(self.experiment))
        except ValueError as error:
            raise InputError(
                "this machine does not understand the experiment",
                got=error,
                hint="Install the same version of fedtrain on all machines of the fleet",
            ) from error


class NodeSettings(_Settings):
    """A SuperNode's config: `flower-supernode --node-config 'client-id="hospital-a" data-root="/data"'`.

    Attributes:
        client_id: whose node it is.
        partition_id: or its position among the experiment's clients, from 0.
        base: folder against which it resolves the experiment's paths.
        data_root: folder of its built-in data sources; FEDTRAIN_DATA unless given.
        states: where it keeps what lasts longer than a round; FLWR_HOME/fedtrain unless given.
        device: where it trains: auto, cpu, cuda or cuda:1; as the experiment says unless given.
    """

    client_id: str | None = None
    partition_id: int | None = Field(default=None, ge=0)
    base: str = "."
    data_root: str | None = Field(default_factory=lambda: os.environ.get("FEDTRAIN_DATA"))
    states: str = Field(default_factory=lambda: str(Path(os.environ.get("FLWR_HOME", "~/.flwr")) / "fedtrain"))
    device: str | None = Field(default=None, pattern=r"^(auto|cpu|cuda(:\d+)?)$")

    def introduction(self) -> RecordDict:
        """Write whose node this is: its answer to a query."""
        names = self.model_dump(include={"client_id", "partition_id"}, by_alias=True, exclude_none=True)
        return RecordDict({_NODE: ConfigRecord(names)})

    @classmethod
    def introduced(cls, content: RecordDict) -> Self:
        """Read an introduction.

        Raises:
            InputError: a value is wrong.
        """
        record = content.config_records.get(_NODE, ConfigRecord())
        return cls.of({key: value for key, value in record.items() if isinstance(value, str | int)})

    def name_among(self, client_ids: Sequence[str]) -> str:
        """The name of the client that the node serves.

        Raises:
            InputError: it serves none of these.
        """
        if self.client_id is not None and self.client_id in client_ids:
            return self.client_id
        if self.client_id is None and self.partition_id is not None and self.partition_id < len(client_ids):
            return client_ids[self.partition_id]
        raise InputError(
            "the SuperNode serves no client of this experiment",
            got=self.client_id or self.partition_id,
            expected="client-id or partition-id in its --node-config",
        )
