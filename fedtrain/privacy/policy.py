"""The client's own policy: what its owner allows, whatever a server asks."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedtrain.errors import ExperimentError, Fault, InputError, nearest, shorten
from fedtrain.experiment.base import Section
from fedtrain.experiment.schema import allowed, inline

__all__ = ["Policy", "Request", "Unit", "load_policy"]

Unit = Literal["sample", "client"]
_LONGEST = 200  # characters of a name that a server may have kept in the ledger


@dataclass(frozen=True)
class Request:
    """What a server asks of a client in one round, as far as privacy is concerned."""

    run: str  # one name per run, the same after a restart
    round_number: int
    experiment: str  # its name: the server can call it what it likes
    experiment_hash: str  # SHA-256 in hex: what it is
    task: str
    parameters: int  # numbers in the model
    model_bytes: int
    unit: Unit
    noise_multiplier: float  # standard deviation of the noise over the clipping norm
    sample_rate: float  # probability of an example, or of a client, to take part in a step
    steps: int  # the most that the round can take


class Policy(Section):
    """What the owner of a client allows; a round that does not keep to it is refused before its first step."""

    max_epsilon: float = Field(gt=0)
    """The most that may be spent on one data set, over all rounds, runs and servers."""

    delta: float = Field(gt=0, lt=1)
    """The delta at which max_epsilon holds; well below one over the number of examples."""

    unit: Unit = "sample"
    """What is protected: sample, each example, against the server too; client, the client as a whole, against all but
    the server, which must be trusted to add the noise."""

    least_noise_multiplier: float = Field(default=0.0, ge=0)
    """Rounds with less noise are refused even if they could be afforded."""

    tasks: list[str] = Field(default=[], min_length=1, examples=[["cnn"]])
    """Tasks that may be trained; leave out for all that are installed here."""

    experiments: list[str] = Field(default=[], min_length=1, examples=[["chest-xray-2"]])
    """Experiments that may be trained, by name or by SHA-256, which nobody can borrow; leave out for all."""

    max_parameters: int = Field(default=1_000_000_000, ge=1)
    """The most numbers that a model may have."""

    max_model_bytes: int = Field(default=4_000_000_000, ge=1)
    """The most bytes that a model may have."""

    def objections(self, request: Request) -> list[str]:
        """Say everything that the policy holds against a request, the budget apart, which is the ledger's to know."""
        found = _malformed(request)
        if request.unit != self.unit:
            found.append(f"unit {shorten(request.unit)}: the policy allows {self.unit}")
        if not request.noise_multiplier >= self.least_noise_multiplier:
            found.append(
                f"noise_multiplier {request.noise_multiplier}: the policy asks for at least "
                f"{self.least_noise_multiplier:g}"
            )
        if self.tasks and request.task not in self.tasks:
            found.append(f"task {shorten(request.task)}: the policy allows {', '.join(self.tasks)}")
        if self.experiments and not {request.experiment, request.experiment_hash} & set(self.experiments):
            found.append(
                f"experiment {shorten(request.experiment)} ({shorten(request.experiment_hash, 12)}): "
                f"the policy allows {', '.join(self.experiments)}"
            )
        if request.parameters > self.max_parameters:
            found.append(f"a model of {request.parameters} parameters: the policy allows {self.max_parameters}")
        if request.model_bytes > self.max_model_bytes:
            found.append(f"a model of {request.model_bytes} bytes: the policy allows {self.max_model_bytes}")
        return found


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Args:
        path: a TOML file in UTF-8, written by the client's owner.

    Raises:
        InputError: it cannot be read: without its policy a client takes no part.
        ExperimentError: it has faults; the error lists all of them.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"the client's policy file cannot be read ({error.strerror})",
            got=path,
            hint="Write one with at least max_epsilon and delta: no policy, no training",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ExperimentError(str(path), [Fault("file", shorten(str(error)), "TOML in UTF-8")]) from error
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        raise ExperimentError(str(path), _faults(error)) from error


def _malformed(request: Request) -> list[str]:
    """Say what no accountant could count and no ledger should keep."""
    rules = {
        "noise_multiplier": (0 < request.noise_multiplier < math.inf, "a finite number above 0"),
        "sample_rate": (0 < request.sample_rate <= 1, "a number above 0 and up to 1"),
        "steps": (request.steps >= 1, "at least 1"),
        "round_number": (request.round_number >= 1, "at least 1"),
        "run": (0 < len(request.run) <= _LONGEST, f"1 to {_LONGEST} characters"),
        "experiment_hash": (bool(re.fullmatch(r"[0-9a-f]{64}", request.experiment_hash)), "a SHA-256 in hex"),
    }
    return [
        f"{key} {shorten(getattr(request, key))}: must be {rule}" for key, (holds, rule) in rules.items() if not holds
    ]


def _faults(error: ValidationError) -> list[Fault]:
    """List all faults of a policy file, which is one flat table."""
    keys: dict[str, dict[str, Any]] = Policy.model_json_schema()["properties"]
    faults = []
    for item in error.errors(include_url=False):
        key, *inside = item["loc"]
        path = shorten(str(key)) + "".join(f"[{place}]" for place in inside)
        if item["type"] == "extra_forbidden":
            faults.append(Fault(path, "an unknown key", f"one of: {', '.join(keys)}", nearest(key, keys, otherwise="")))
        elif item["type"] == "missing":
            faults.append(Fault(path, "nothing", allowed(keys[str(key)]), keys[str(key)]["description"]))
        else:
            hint = nearest(item["input"], keys[str(key)].get("enum", ()), otherwise="")
            faults.append(Fault(path, shorten(inline(item["input"])), allowed(keys[str(key)]), hint))
    return faults
