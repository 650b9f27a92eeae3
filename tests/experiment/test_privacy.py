import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import fedtrain.privacy
from fedtrain.errors import ExperimentError
from fedtrain.experiment import load
from fedtrain.experiment.privacy import SamplePrivacy

BASE = '[data]\nname = "digits"\nclients = 100\n[privacy]\nepsilon = 8.0\ndelta = 1e-4\n'
BY_CLIENT = ('privacy.unit="client"', 'clients.sampling="poisson"')


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "private.toml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["evaluation.clients_every=2"], "evaluation.clients_every asks for measurements"),
        (["personalization.fine_tune_epochs=1"], "personalization.fine_tune_epochs serves measurements"),
        (['strategy.name="fednova"'], 'strategy.name = "fednova" needs to know of the clients'),
        (['strategy.name="qfedavg"'], 'strategy.name = "qfedavg" needs to know of the clients'),
        (['strategy.name="ditto"'], 'strategy.name = "ditto" needs to know of the clients'),
        (['clients.sampling="by-size"'], 'clients.sampling = "by-size" goes by sizes or losses'),
        (
            ['clients.sampling="power-of-choice"', "clients.per_round=3"],
            'clients.sampling = "power-of-choice" goes by sizes or losses',
        ),
        (['data.scaling="pooled"'], 'data.scaling = "pooled" is fitted on the examples'),
        (['data.scaling="client"'], 'data.scaling = "client" is fitted on the examples'),
        (
            ["training.precision=bfloat16"],
            'training.precision = "bfloat16" rounds the gradients whose norms are bounded',
        ),
        (["data.test=0.2"], "data.held_out and data.validation hold out examples by a draw"),
        (["data.validation=0.2"], "data.held_out and data.validation hold out examples by a draw"),
        ([*BY_CLIENT, 'data.scaling="pooled"'], 'data.scaling = "pooled" is fitted on the examples'),
        ([*BY_CLIENT, 'strategy.name="feddyn"'], 'strategy.name = "feddyn" needs every single update'),
        ([*BY_CLIENT, 'strategy.name="scaffold"'], 'strategy.name = "scaffold" needs every single update'),
        ([*BY_CLIENT, 'strategy.name="median"'], 'strategy.name = "median" needs every single update'),
        ([*BY_CLIENT[:1], "clients.per_round=10"], "counts on a coin for each client"),
        (["privacy.noise_multiplier=1.0"], "give either epsilon, the budget of the whole run, or noise_multiplier"),
        (["privacy.noise_multiplier=1e-9"], "greater than 0"),
        (["privacy.epsilon=0"], "greater than 0"),
        (["privacy.delta=1.0"], "below 1"),
        (["privacy.max_delta_norm=1.0"], "privacy.max_delta_norm"),
    ],
)
def test_what_would_break_the_promise_is_refused_with_the_reason(file: Path, overrides: list[str], why: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        load(file, overrides)
    assert why in str(caught.value) or "at least 0.01" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.name=scaffold"],
        ["strategy.name=median"],
        ["strategy.name=fedprox"],
        ["clients.per_round=10"],
        [*BY_CLIENT, "clients.per_round=10", "data.test=0.2", 'data.scaling="client"'],
        [*BY_CLIENT, "strategy.name=fedadam", "privacy.adaptive_clipping={}"],
        ['privacy.unit="client"', "clients.sampling=uniform"],  # all are asked: nothing counts on coins
    ],
)
def test_what_keeps_the_promise_loads(file: Path, overrides: list[str]) -> None:
    assert load(file, overrides).privacy is not None


def test_without_privacy_nothing_of_this_is_refused(file: Path) -> None:
    file.write_text(BASE.partition("[privacy]")[0])
    assert load(file, ["data.test=0.2", 'data.scaling="pooled"', "strategy.name=ditto"]).privacy is None


@pytest.mark.parametrize(
    ("key", "value"), [("mode", "ew"), ("clipping", "adaptive"), ("accountant", "gdp"), ("secure_mode", True)]
)
def test_what_opacus_has_and_does_not_hold_is_not_offered(key: str, value: object) -> None:
    fields = {"unit": "sample", "epsilon": 1.0, "delta": 1e-5, key: value}
    with pytest.raises(ValidationError, match=key):
        SamplePrivacy.model_validate(fields)


def test_nothing_of_opacus_that_pickles_or_orchestrates_is_called() -> None:
    privacy = Path(fedtrain.privacy.__file__).parent
    text = "".join(path.read_text() for path in privacy.glob("*.py"))
    assert not re.findall(r"load_checkpoint|PrivacyEngine\(|secure_mode|torch\.load|pickle\.", text)
