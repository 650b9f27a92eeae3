"""Files that `[model]` names, at a client: needed where the server does not send all values, and the server's own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedtrain.deployment.site import Owner, assemble
from fedtrain.deployment.terms import MODEL_FILES, accepted, offer_for
from fedtrain.errors import InputError, PolicyError
from fedtrain.experiment.load import identity
from fedtrain.experiment.sections import Experiment
from fedtrain.link.control import Offer

RUN = "0" * 32


def experiment(start: str = "start.safetensors", **fields: object) -> Experiment:
    model = {"start": start, **fields.pop("model", {})}
    data = {"name": "digits", "clients": 3}
    return Experiment.model_validate({"task": {"name": "logistic"}, "data": data, "model": model, **fields})


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    save_file({"fc1.weight": torch.ones(10, 64), "fc1.bias": torch.ones(10)}, folder / "start.safetensors")
    return folder


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    (tmp_path / "client").mkdir()
    return Owner("client-0", tmp_path, tmp_path / "home", device="cpu", base=tmp_path / "client")


def test_a_client_that_is_sent_all_values_needs_no_file(server: Path, owner: Owner) -> None:
    assemble(owner, offer_for(experiment(), RUN, base=server))


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"freeze": ["fc1.weight"]}},
        {"model": {"lora": {"rank": 2}}},
        {"personalization": {"private": ["fc1.bias"]}},
        {"compression": {"down": ["int8"], "down_of": "change"}},
    ],
)
def test_a_client_needs_the_servers_file_for_what_is_not_sent(server: Path, owner: Owner, fields: dict) -> None:
    offer = offer_for(experiment(**fields), RUN, base=server)
    copy = owner.base / "start.safetensors"
    with pytest.raises(InputError, match=rf"is not here.*got start\.safetensors.*Copy the server's file to {copy}"):
        assemble(owner, offer)
    save_file({"fc1.weight": torch.zeros(10, 64), "fc1.bias": torch.ones(10)}, copy)
    with pytest.raises(InputError, match="another one than the server's"):
        assemble(owner, offer)
    copy.write_bytes((server / "start.safetensors").read_bytes())
    assemble(owner, offer)
    untold = offer.model_copy(update={"facts": {k: v for k, v in offer.facts.items() if k != MODEL_FILES}})
    with pytest.raises(InputError, match="another one than the server's"):
        assemble(owner, untold)


@pytest.mark.parametrize("field", ["start", "gains"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.safetensors", "a/../../b", "~/secret.safetensors"])
def test_a_server_cannot_name_a_file_outside_the_owners_folder(name: str, field: str) -> None:
    data = {"name": "digits", "clients": 3}
    wanted = Experiment.model_validate({"data": data, "model": {field: name}})
    facts = {"experiment": wanted.model_dump(mode="json")}
    with pytest.raises(PolicyError, match="outside this client's folder"):
        accepted(Offer(run=RUN, experiment_hash=identity(wanted), facts=facts), ())


def test_a_server_whose_own_file_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a file of \[model\] cannot be read"):
        offer_for(experiment(), RUN, base=tmp_path)
