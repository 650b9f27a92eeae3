import subprocess
import sys
import tomllib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtrain.errors import ExperimentError, InputError
from fedtrain.experiment import Experiment, identity, load, to_toml
from fedtrain.experiment.clients import ConstantDuration
from fedtrain.experiment.faults import faults_of
from fedtrain.experiment.schema import schema_tree
from fedtrain.experiment.strategies import OwnStrategy

MINIMAL = '[data]\nname = "digits"\nclients = 5\n'
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
OPTIONS = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.dates()
    | st.times()
    | st.datetimes(allow_imaginary=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "first.toml"
    path.write_text(MINIMAL)
    return path


def values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Whatever the JSON Schema lets a key hold."""
    if "oneOf" in node or "anyOf" in node:
        return st.one_of(*(values(member) for member in node.get("oneOf", node.get("anyOf"))))
    if "enum" in node or "const" in node:
        return st.sampled_from(node.get("enum") or [node["const"]])
    if "properties" in node:
        needed = node.get("required", [])
        members = {key: values(child) for key, child in node["properties"].items()}
        optional = {key: child for key, child in members.items() if key not in needed}
        return st.fixed_dictionaries({key: members[key] for key in needed}, optional=optional)
    if "pattern" in node:
        return st.from_regex(node["pattern"].replace("$", r"\Z").replace(r"\d", "[0-9]"))
    least, most = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum", node.get("exclusiveMaximum"))
    match node["type"]:
        case "integer":
            return st.integers(least, most - ("exclusiveMaximum" in node) if most else None)
        case "number":
            outside = {"exclude_min": "exclusiveMinimum" in node, "exclude_max": "exclusiveMaximum" in node}
            finite = {"allow_nan": False, "allow_infinity": False}
            return st.floats(least, most, **outside, **finite)
        case "string":
            return st.text(st.characters(exclude_categories=["Cs"]))
        case "boolean":
            return st.booleans()
        case "array" if "prefixItems" in node:
            return st.tuples(*(values(item) for item in node["prefixItems"])).map(list)
        case "array":
            return st.lists(values(node["items"]), min_size=node.get("minItems", 0), max_size=4)
    held = node["additionalProperties"]
    return st.dictionaries(KEYS, values(held) if isinstance(held, dict) else OPTIONS, max_size=3)


def reconcile(document: dict[str, Any]) -> dict[str, Any]:
    """Take out of a document what contradicts itself, which a schema cannot say."""
    data, training, evaluation, clients, strategy = (
        document.setdefault(key, {}) for key in ("data", "training", "evaluation", "clients", "strategy")
    )
    data.pop("path", None)
    data.setdefault("name", "digits")
    kind = data.get("partition", {}).get("kind", "iid")
    data["clients"] = 4 if kind == "fcube" else data.get("clients", 7)
    if kind == "natural":
        del data["clients"]
    for key in ("validation", "test"):
        data[key] = data.get(key, 0.0) / 2
    if "fold" in data:
        data["fold"]["number"] = 1
        data.pop("test")
    data.pop("held_out", None)
    if "local_steps" in training:
        training.pop("local_epochs", None)
    training.get("optimizer", {}).pop("nesterov", None)
    if "target_value" not in evaluation or "target_metric" not in evaluation:
        evaluation.pop("target_value", None)
        evaluation.pop("target_metric", None)
    if "target_metric" in evaluation:
        document.pop("personalization", None)
        evaluation["target_value"] = min(evaluation["target_value"], 1.0)  # no accuracy is above
    clients["per_round"] = min(clients.get("per_round", 5), data.get("clients", 5))
    match strategy.get("name"):
        case "scaffold" | "fednova" | "qfedavg":
            for key in ("optimizer", "schedule", "layer_lr"):
                training.pop(key, None)
        case "krum" | "multi-krum" | "bulyan":
            strategy["byzantine"] = 0
            strategy.pop("keep", None)
            clients["per_round"] = data.get("clients", 5)
            if clients["per_round"] < 3:
                strategy.clear()
        case "ditto":
            document.pop("personalization", None)
        case "fedbuff":
            strategy["buffer_size"] = min(strategy.get("buffer_size", 5), data.get("clients", 5))
            for key in ("per_round", "sampling", "over_selection", "deadline"):
                clients.pop(key, None)
            clients["duration"] = {"seconds": 3.0}
    if clients.get("sampling") != "power-of-choice":
        clients.pop("candidates", None)
    elif "candidates" in clients:
        clients["candidates"] = max(clients["candidates"], clients["per_round"])
    if "tags" not in clients:
        clients.pop("where", None)
    if clients.get("sampling") == "poisson" or "duration" not in clients:
        clients.pop("over_selection", None)
    if "duration" not in clients:
        clients.pop("deadline", None)
    if "deadline" not in clients:
        clients.pop("late", None)
    compression = document.setdefault("compression", {})
    compression.pop("up_of", None)
    compression.pop("down_of", None)
    compression["up"] = compression.get("up", [])[:1]  # more than one stage have an order
    compression["down"] = [stage for stage in compression.get("down", []) if stage.startswith(("int", "bf", "zs"))][:1]
    reconcile_recipe(document)
    if "privacy" in document:
        reconcile_privacy(document)
    return document


def reconcile_recipe(document):
    """The same for what belongs to the training recipe."""
    training, evaluation = document["training"], document["evaluation"]
    model, run = document.setdefault("model", {}), document.setdefault("run", {})
    for key in ("optimizer_state", "early_stopping", "average"):
        training.pop(key, None)
    if training.get("schedule", {}).get("name") == "plateau":
        del training["schedule"]
    mixing = [change for change in training.get("augment", []) if change["name"] in ("mixup", "cutmix")]
    if mixing:
        training["augment"] = [change for change in training["augment"] if change not in mixing] + mixing[-1:]
        training.pop("balance", None)
    if "curriculum" in training:
        training["curriculum"]["rounds"] = min(training["curriculum"].get("rounds", 10), 1_000_000)
        document["rounds"] = max(document.get("rounds", 10), training["curriculum"]["rounds"])
    for weights in ("class_weights", "alpha"):
        training.get("loss", {}).pop(weights, None)
    model.pop("unfreeze", None)
    if "start" not in model:
        model.pop("drop", None)
        model.pop("rename", None)
    else:
        model.pop("gains", None)
        if model.get("init", {}).get("name") == "lsuv":
            del model["init"]
    if "lora" in model:
        model.pop("freeze", None)
    if training.get("compile"):
        model.pop("checkpoint", None)
    run.pop("gpus", None)
    if document["data"].get("scaling") == "client" or "personalization" in document:
        evaluation.pop("attack", None)
        evaluation.pop("group", None)
    if "attack" in evaluation:
        evaluation["attack"].pop("clip", None)


def reconcile_privacy(document):
    """It contradicts much: what is left beside it is plain."""
    privacy = document["privacy"]
    document["compression"].pop("max_bytes", None)
    privacy.pop("noise_multiplier" if "epsilon" in privacy else "epsilon", None)
    if "epsilon" not in privacy:
        privacy["noise_multiplier"] = 1.1
    document["strategy"], document["personalization"] = {}, {}
    document["evaluation"].pop("clients_every", None)
    training = document["training"]
    for key in ("precision", "clip_norm", "clip_value", "micro_batch_size", "compile", "balance", "curriculum"):
        training.pop(key, None)
    document["model"].pop("checkpoint", None)
    training["augment"] = [a for a in training.get("augment", []) if a["name"] not in ("mixup", "cutmix")]
    if privacy.get("mode") == "ghost" or not training["augment"]:
        privacy.pop("augmentations", None)
    for key in ("scaling", "test", "validation", "fold"):
        document["data"].pop(key, None)
    for key in ("sampling", "candidates", "over_selection"):
        document["clients"].pop(key, None)
    if privacy.get("unit") == "client":
        document["clients"]["sampling"] = "poisson"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=values(schema_tree()).map(reconcile))
def test_what_the_schema_allows_loads_and_survives_a_round_trip(document, tmp_path_factory):
    experiment = Experiment.model_validate(document)
    file = tmp_path_factory.mktemp("round") / "trip.toml"
    file.write_text(to_toml(experiment), encoding="utf-8")
    again = load(file)
    assert again == experiment
    assert identity(again) == identity(experiment)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=values(schema_tree()))
def test_what_the_schema_allows_is_at_worst_a_contradiction(document):
    try:
        Experiment.model_validate(document)
    except ValidationError as error:
        found = faults_of(error, document, {})
        assert found
        contradictions = [fault for fault in found if fault.path not in ("compression.up", "compression.down")]
        assert all(fault.expected.startswith("values that go together: ") for fault in contradictions)


def test_an_own_strategy_may_stand_in_the_name(file):
    file.write_text(MINIMAL + '[strategy]\nname = "own_strategy.py:build"\noptions = { power = 0.5 }\n')
    experiment = load(file)
    assert experiment.strategy == OwnStrategy(name="own", path="own_strategy.py:build", options={"power": 0.5})
    resolved = file.with_name("resolved.toml")
    resolved.write_text(to_toml(experiment))
    assert load(resolved) == experiment
    assert load(file, ["strategy.name=flwr.serverapp.strategy:FedMedian", "strategy.options={}"]).strategy == (
        OwnStrategy(name="own", path="flwr.serverapp.strategy:FedMedian")
    )


def test_the_name_is_the_files_own_unless_given(tmp_path):
    file = tmp_path / "__my first, run.toml"
    file.write_text(MINIMAL)
    assert load(file).name == "my-first-run"
    file.write_text('name = "chosen"\n' + MINIMAL)
    assert load(file).name == "chosen"


def test_resolved_text_spells_out_every_default_in_the_files_order(file):
    resolved = tomllib.loads(to_toml(load(file)))
    assert list(resolved) == [key for key in Experiment.model_fields if key != "privacy"]  # it has no default
    assert resolved["data"]["partition"] == {"kind": "iid", "min_examples": 2}
    assert resolved["run"]["workers"] == "auto"
    assert "local_steps" not in resolved["training"]


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("strategy.name=scaffold", "strategy", "name", "scaffold"),
        ("task.name = 'cnn'", "task", "name", "cnn"),
        ("task.options.hidden=[3, 4]", "task", "options", {"hidden": [3, 4]}),
        ("data.clients=12", "data", "clients", 12),
        ("run.workers=0", "run", "workers", 0),
        ("run.workers=auto", "run", "workers", "auto"),
        ("data.target=a=b", "data", "target", "a=b"),
    ],
)
def test_an_override_is_toml_or_a_bare_word(file, override, section, field, value):
    assert getattr(getattr(load(file, [override]), section), field) == value


def test_an_override_into_an_absent_table_keeps_the_default_kind(file):
    experiment = load(file, ["training.optimizer.lr=1", "data.partition.min_examples=3", "clients.duration.seconds=2"])
    assert (experiment.training.optimizer.name, experiment.training.optimizer.lr) == ("sgd", 1.0)
    assert (experiment.data.partition.kind, experiment.data.partition.min_examples) == ("iid", 3)
    assert experiment.clients.duration == ConstantDuration(seconds=2.0)


def test_later_overrides_win(file):
    experiment = load(
        file, ['data.partition={kind="dirichlet", alpha=1}', "data.partition.alpha=2.5", "rounds=3", "rounds=4"]
    )
    assert (experiment.data.partition.alpha, experiment.rounds) == (2.5, 4)


def test_an_override_cannot_break_out_of_its_line(file):
    assert load(file, ["data.target=1\nseed = 9"]).seed == 0


def test_identity_is_of_what_is_computed(file):
    first = identity(load(file))
    assert first == identity(load(file, ["name=other", "run.workers=3", "run.device=cpu"]))
    assert len({first, identity(load(file, ["seed=1"])), identity(load(file, ["evaluation.max_clients=3"]))}) == 3
    assert identity(load(file, ["training.optimizer.lr=1"])) == identity(load(file, ["training.optimizer.lr=1.0"]))


def test_a_byte_order_mark_is_no_fault(file):
    file.write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert load(file).data.clients == 5


def test_a_missing_file_names_the_nearest_or_says_how_to_write_one(tmp_path):
    with pytest.raises(InputError, match=r"no such experiment file.*fedtrain init frist\.toml"):
        load(tmp_path / "frist.toml")
    (tmp_path / "first.toml").write_text(MINIMAL)
    with pytest.raises(InputError, match=r"Did you mean .*first\.toml\?"):
        load(tmp_path / "frist.toml")


def test_a_folder_is_refused_and_a_runs_own_experiment_offered(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "experiment.toml").write_text(MINIMAL)
    with pytest.raises(InputError, match=r"Did you mean .*experiment\.toml\?"):
        load(tmp_path)


def test_text_that_is_not_utf8_is_refused(file):
    file.write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(InputError, match="not UTF-8"):
        load(file)


def test_an_unreadable_file_is_refused(file, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_text", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        load(file)


@pytest.mark.parametrize(
    ("text", "place", "got"),
    [
        ("seed = 1\nrounds = = 3\n", "line 2, column 10", "rounds = = 3"),
        ("[training.optimizer]\nnesterov = True\n", "line 2, column 12", "nesterov = True"),
        ('name = "x', "end of file", "Unterminated string"),
        ("x = " + "[" * 5000, "file", "recursion"),
        ("seed = " + "9" * 5000, "file", "5000 digits"),
    ],
)
def test_a_file_that_is_not_toml_has_one_fault_with_its_place(file, text, place, got):
    file.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        load(file)
    (fault,) = caught.value.faults
    assert fault.path == place
    assert got in fault.got


def test_nothing_heavy_is_imported():
    code = "import sys, fedtrain.experiment; print([m for m in ('torch', 'flwr', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
