import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtrain.errors import ExperimentError
from fedtrain.experiment import Experiment, load
from fedtrain.experiment.faults import ELSEWHERE, faults_of
from fedtrain.experiment.schema import positions, schema_tree

MINIMAL = '[data]\nname = "digits"\nclients = 5\n'
LIST_OF_NAMES = 'a list of strings such as ["fc2.*"] or ["*norm*"]'
CLIENTS = MINIMAL + "[clients]\n"
STRATEGY = MINIMAL + "[strategy]\nname = "
IMPORT_PATH = "a string such as: flwr.serverapp.strategy:FedTrimmedAvg, own_strategy.py:build"


@pytest.fixture
def faults(tmp_path):
    """The faults of a file's text, by path."""

    def of(text: str, *overrides: str):
        file = tmp_path / "faulty.toml"
        file.write_text(text)
        with pytest.raises(ExperimentError) as caught:
            load(file, overrides)
        found = {fault.path: fault for fault in caught.value.faults}
        assert len(found) == len(caught.value.faults), "a place is listed once"
        assert all(str(fault) in str(caught.value) for fault in found.values())
        return found

    return of


def test_all_faults_are_listed_at_once(faults):
    found = faults(
        """
        seed = true
        rounds = 1.0
        roundz = 3
        [data]
        name = "digits"
        clients = 5
        partition = { kind = "dirichlet", alfa = 3 }
        scaling = { mean = [1], std = [0.0, "x"] }
        [training]
        optimizer = { lr = "0.1" }
        [strategy]
        name = "fedavgg"
        [evaluation]
        max_clients = inf
        """
    )
    assert list(found) == [
        "seed",
        "rounds",
        "data.partition.alpha",
        "data.partition.alfa",
        "data.scaling.std[0]",
        "data.scaling.std[1]",
        "training.optimizer.lr",
        "strategy.name",
        "evaluation.max_clients",
        "roundz",
    ]


@pytest.mark.parametrize(
    ("text", "path", "got", "expected"),
    [
        ("seed = true\n", "seed", "true", "an integer of at least 0 and below 9223372036854775808"),
        ("rounds = 1.0\n", "rounds", "1.0", "an integer from 1 to 1000000"),
        ("rounds = 0\n", "rounds", "0", "an integer from 1 to 1000000"),
        ('name = "a/b"\n', "name", '"a/b"', "a string"),
        ("personalization = 3\n", "personalization", "3", "a table with private, fine_tune_epochs"),
        ("training.optimizer.lr = nan\n", "training.optimizer.lr", "nan", "a number greater than 0"),
        ("run.checkpoint_seconds = inf\n", "run.checkpoint_seconds", "inf", "a number of at least 0"),
        ("training.optimizer.lr = true\n", "training.optimizer.lr", "true", "a number greater than 0"),
        ("training.optimizer.nesterov = 1\n", "training.optimizer.nesterov", "1", "true or false"),
        (
            'clients.sampling = "unifrom"\n',
            "clients.sampling",
            '"unifrom"',
            "one of: uniform, poisson, by-size, power-of-choice",
        ),
        ("clients.where.gpu = 0.5\n", "clients.where.gpu", "0.5", "a string, or true or false, or an integer"),
        ("clients.where.gpu.x = 1\n", "clients.where.gpu", "{ x = 1 }", "a string, or true or false, or an integer"),
        ("clients.where = 1\n", "clients.where", "1", 'a table such as { gpu = true, site = "north" }'),
        ('personalization.private = "fc"\n', "personalization.private", '"fc"', LIST_OF_NAMES),
        (
            'strategy = { name = "fedadam", betas = [0, 1] }\n',
            "strategy.betas[1]",
            "1",
            "a number of at least 0 and below 1",
        ),
        ('strategy = { name = "own", path = "build" }\n', "strategy.path", '"build"', IMPORT_PATH),
        ('strategy.name = "own"\n', "strategy.path", "nothing", IMPORT_PATH),
        ('clients.duration.kind = "stragglers"\n', "clients.duration.fraction", "nothing", "a number from 0 to 1"),
        ("clients.quorum = 1.5\n", "clients.quorum", "1.5", "a number from 0 to 1"),
        ("run.workers = -1\n", "run.workers", "-1", '"auto", or an integer of at least 0'),
        ("run.workers = true\n", "run.workers", "true", '"auto", or an integer of at least 0'),
        ('run.device = "tpu"\n', "run.device", '"tpu"', "a string such as: auto, cpu, cuda:1"),
        (
            'training.optimizer = { name = "adam", betas = [0.9, 0.9, 0.9] }\n',
            "training.optimizer.betas",
            "[0.9, 0.9, 0.9]",
            "a list of 2 numbers of at least 0 and below 1",
        ),
        (
            'training.optimizer = { name = "adam", betas = [0.9, 1] }\n',
            "training.optimizer.betas[1]",
            "1",
            "a number of at least 0 and below 1",
        ),
        (
            'training.optimizer.name = "sdg"\n',
            "training.optimizer.name",
            '"sdg"',
            "one of: sgd, adam, adamw, adabound, adadelta, adafactor, adagrad, adamax, asgd, muon, nadam, radam, "
            "rmsprop, rprop, own",
        ),
        (MINIMAL + "drop = [3]\n", "data.drop[0]", "3", "a string"),
        (MINIMAL + 'drop = "id"\n', "data.drop", '"id"', "a list of strings"),
        (MINIMAL + "options = 3\n", "data.options", "3", "a table"),
        (
            MINIMAL + 'scaling = "mean"\n',
            "data.scaling",
            '"mean"',
            "one of: none, client, pooled, or a table with mean, std",
        ),
        (
            MINIMAL + "scaling = { mean = [], std = [1] }\n",
            "data.scaling.mean",
            "[]",
            "a list of numbers, at least one",
        ),
        (
            MINIMAL + 'partition = { kind = "dirichlet" }\n',
            "data.partition.alpha",
            "nothing",
            "a number greater than 0 and at most 1000000",
        ),
    ],
)
def test_a_fault_says_what_was_got_and_what_is_allowed(faults, text, path, got, expected):
    found = faults(text if "[data]" in text else text + MINIMAL)
    assert list(found) == [path]
    assert (found[path].got, found[path].expected) == (got, expected)


def test_a_partition_that_is_no_table_shows_how_to_write_one(faults):
    fault = faults(MINIMAL + 'partition = "iid"\n')["data.partition"]
    assert fault.expected.startswith('a table such as { kind = "iid" }, with kind one of: iid, dirichlet, shards,')


def test_a_missing_section_is_a_fault(faults):
    fault = faults("seed = 1\n")["data"]
    assert fault.got == "nothing"
    assert fault.expected.startswith("a table with name, path, target,")


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("roundz = 3\n", "roundz", "Did you mean rounds?"),
        ("lr = 0.1\n", "lr", "Did you mean training.optimizer.lr or privacy.adaptive_clipping.lr?"),
        ("batch_size = 8\n", "batch_size", "Did you mean training.batch_size or evaluation.batch_size?"),
        ("clients = 100\n", "clients", "Did you mean data.clients?"),
        ("training.optimiser.lr = 0.1\n", "training.optimiser", "Did you mean optimizer?"),
        ("training.learning_rate = 1\n", "training.learning_rate", "Did you mean training.optimizer.lr?"),
        ("epochs = 3\n", "epochs", "Did you mean training.local_epochs?"),
        ('evaluation.attack = { name = "fgsm", eps = 1 }\n', "evaluation.attack.eps", "Did you mean epsilon?"),
        ('strategy = { name = "fedadam", learning_rate = 1 }\n', "strategy.learning_rate", ""),
        (MINIMAL + 'dataset = "mnist"\n', "data.dataset", "Did you mean data.name?"),
        ("num_rounds = 3\n", "num_rounds", "Did you mean rounds?"),
        ("foobar = 1\n", "foobar", ""),
        (MINIMAL + "partition.alpha = 3\n", "data.partition.alpha", "alpha goes with kind = dirichlet or quantity."),
        (MINIMAL + 'partition.kind = "dirichlett"\n', "data.partition.kind", "Did you mean dirichlet?"),
        ('clients.sampling = "unifrom"\n', "clients.sampling", "Did you mean uniform?"),
        ('strategy.name = "scafold"\n', "strategy.name", "Did you mean scaffold?"),
        ('strategy.name = "SCAFFOLD"\n', "strategy.name", "Did you mean scaffold?"),
        (MINIMAL + 'partition.name = "dirichlet"\n', "data.partition.name", "Did you mean kind?"),
        ('strategy.kind = "fedadam"\n', "strategy.kind", "Did you mean name?"),
        (MINIMAL + "[gate]\nname = 1\n", "gate.name", ""),  # too many tables have a name
        ('clients.duration.kind = "const"\n', "clients.duration.kind", "Did you mean constant?"),
        ("strategy.mu = 1\n", "strategy.mu", "mu goes with name = fedprox or ditto."),
        ("strategy.q = 1\n", "strategy.q", "q goes with name = qfedavg."),
        ("strategy.byzantine = 1\n", "strategy.byzantine", "byzantine goes with name = krum, multi-krum or bulyan."),
        ('strategy = { name = "fedprox", muu = 1 }\n', "strategy.muu", "Did you mean mu?"),
        ('strategy = { name = "own.py:build", optins = {} }\n', "strategy.optins", "Did you mean options?"),
    ],
)
def test_the_nearest_key_or_value_is_named(faults, text, path, hint):
    assert faults(text if "[data]" in text else text + MINIMAL)[path].hint == hint


@pytest.mark.parametrize(
    ("path", "text", "hint"),
    [
        ("training.schedule", '"cosine"', 'Write training.schedule = { name = "cosine" }.'),
        ("training.schedule", '"cosines"', ""),
        ("training.augment", '"flip"', 'Write training.augment = [{ name = "flip" }].'),
        ("privacy", '"client"', 'Write privacy = { unit = "client" }.'),
        ("task", '"mlp"', 'Write task = { name = "mlp" }.'),
        ("compression.up", '"int8"', 'Write compression.up = ["int8"].'),
        ("compression.up", "8", ""),
        ("compression.up", '"topk"', ""),
        ("evaluation.metrics", '"acuracy"', ""),
        ("training.augment", f'"{"x" * 100}"', ""),
        ("model", '"resnet18-gn"', ""),
    ],
)
def test_what_is_meant_by_its_name_alone_is_written_out(faults, path, text, hint):
    assert faults(f"{path} = {text}\n{MINIMAL}")[path].hint == hint


def test_keys_by_the_names_of_other_tools_exist():
    paths = {path for _, path, _ in positions(schema_tree())}
    assert set(ELSEWHERE.values()) <= paths
    assert not {key for key, *_ in positions(schema_tree())} & set(ELSEWHERE)


def test_an_unknown_key_lists_the_allowed_ones(faults):
    fault = faults("[personalization]\nprivat = []\n" + MINIMAL)["personalization.privat"]
    assert (fault.got, fault.expected) == ("an unknown key", "one of: private, fine_tune_epochs")


def test_an_odd_key_cannot_reach_the_terminal_raw(faults):
    (path,) = faults('"a\\u001b[31m \\u202e b" = 1\n' + MINIMAL)
    assert path.isprintable()


@pytest.mark.parametrize(
    ("text", "path", "got"),
    [
        ('[data]\nname = "digits"\npath = "x.csv"\n', "data", 'name = "digits", path = "x.csv"'),
        ('[data]\nname = "digits"\n', "data", 'no clients, no partition (default { kind = "iid", min_examples = 2 })'),
        ('[data]\npath = "x.csv"\nclients = 3\n', "data", "no target"),
        (MINIMAL + "validation = 0.5\ntest = 0.5\n", "data", "validation = 0.5, test = 0.5"),
        (MINIMAL + "[training]\nlocal_epochs = 1\nlocal_steps = 2\n", "training", "local_epochs = 1, local_steps = 2"),
        (
            MINIMAL + "[training]\noptimizer = { nesterov = true }\n",
            "training.optimizer",
            "nesterov = true, no momentum (default 0.0)",
        ),
        (MINIMAL + "[clients]\nper_round = 6\n", "clients.per_round", "clients.per_round = 6, data.clients = 5"),
        (CLIENTS + "candidates = 3\n", "clients", 'candidates = 3, no sampling (default "uniform")'),
        (
            CLIENTS + 'sampling = "power-of-choice"\nper_round = 3\ncandidates = 2\n',
            "clients",
            "candidates = 2, per_round = 3",
        ),
        (CLIENTS + "where = { gpu = true }\n", "clients", "where = { gpu = true }, no tags"),
        (CLIENTS + "over_selection = 1.5\nduration = {}\n", "clients", "over_selection = 1.5, no per_round"),
        (
            CLIENTS + 'over_selection = 1.5\nduration = {}\nper_round = 2\nsampling = "poisson"\n',
            "clients",
            'over_selection = 1.5, sampling = "poisson"',
        ),
        (CLIENTS + 'late = "partial"\nduration = {}\n', "clients", 'late = "partial", no deadline'),
        (
            STRATEGY + '"fednova"\n[training]\noptimizer = { name = "adam" }\n',
            "strategy.name",
            'strategy.name = "fednova", training.optimizer.name = "adam"',
        ),
        (
            STRATEGY + '"scaffold"\n[training]\noptimizer = { name = "adam" }\n',
            "strategy.name",
            'strategy.name = "scaffold", training.optimizer = { name = "adam" }',
        ),
        (
            STRATEGY + '"scaffold"\n[training]\noptimizer = { momentum = 0.9 }\n',
            "strategy.name",
            'strategy.name = "scaffold", training.optimizer = { momentum = 0.9 }',
        ),
        (
            STRATEGY + '"scaffold"\n[training]\noptimizer = { weight_decay = 0.1 }\n',
            "strategy.name",
            'strategy.name = "scaffold", training.optimizer = { weight_decay = 0.1 }',
        ),
        (
            STRATEGY + '"fedbuff"\nbuffer_size = 2\n[clients]\nduration = {}\ndeadline = 3\n',
            "strategy.name",
            'strategy.name = "fedbuff", clients.deadline = 3',
        ),
        (
            STRATEGY + '"ditto"\n[personalization]\nfine_tune_epochs = 1\n',
            "strategy.name",
            'strategy.name = "ditto", personalization.fine_tune_epochs = 1',
        ),
    ],
)
def test_a_contradiction_shows_the_values_that_clash(faults, text, path, got):
    (fault,) = faults(text).values()
    assert (fault.path, fault.got) == (path, got)
    assert fault.expected.startswith("values that go together: ")


@pytest.mark.parametrize(
    ("text", "path", "got"),
    [
        (CLIENTS + 'sampling = "power-of-choice"\n', "clients", {"no per_round"}),
        (
            STRATEGY + '"fedbuff"\nbuffer_size = 6\n[clients]\nduration = {}\n',
            "strategy.buffer_size",
            {"strategy.buffer_size = 6", "data.clients = 5"},
        ),
        (
            STRATEGY + '"multi-krum"\nkeep = 6\n',
            "strategy.name",
            {'strategy.name = "multi-krum"', "data.clients = 5"},
        ),
        (
            STRATEGY + '"krum"\nbyzantine = 2\n',
            "strategy.name",
            {'strategy.name = "krum"', "data.clients = 5", "strategy.byzantine = 2"},
        ),
        (
            STRATEGY + '"bulyan"\nbyzantine = 0\n[clients]\nper_round = 2\n',
            "strategy.name",
            {'strategy.name = "bulyan"', "clients.per_round = 2"},
        ),
        (
            STRATEGY + '"fedbuff"\n[clients]\nduration = {}\nper_round = 2\n',
            "strategy.name",
            {'strategy.name = "fedbuff"', "clients.per_round = 2"},
        ),
        (
            STRATEGY + '"fedbuff"\n[clients]\nduration = {}\nsampling = "poisson"\n',
            "strategy.name",
            {'strategy.name = "fedbuff"', 'clients.sampling = "poisson"'},
        ),
    ],
)
def test_a_contradiction_shows_at_least(faults, text, path, got):
    (fault,) = faults(text).values()
    assert fault.path == path
    assert got <= set(fault.got.split(", "))
    assert fault.expected.startswith("values that go together: ")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("strategy.name=fedavgg", "strategy.name"),
        ("data.partition.kind=dirichlet", "data.partition.alpha"),
        ('data.partition={kind="dirichlet"}', "data.partition.alpha"),
        ("seed.x=1", "seed"),
        ("foo.bar=1", "foo"),
        ("clients.per_round=6", "clients.per_round"),
        ("data.partition.kind=natural", "data"),
        ("strategy.mu=0.1", "strategy.mu"),
        ("strategy.name=bulyan", "strategy.name"),
        ("clients.late=partial", "clients"),
    ],
)
def test_a_fault_names_the_override_that_caused_it(faults, override, path):
    assert faults(MINIMAL, override)[path].hint.endswith(f"Set by --set {override}")


def test_a_fault_of_the_file_names_no_override(faults):
    assert faults("seed = -1\n" + MINIMAL, "rounds=0")["seed"].hint == ""


@pytest.mark.parametrize(
    "override", ["foo", "=3", "rounds=", "a b=1", "a..b=1", "data.name.x=1", "name='x", "rounds=[1"]
)
def test_a_malformed_override_is_a_fault_beside_those_of_the_file(faults, override):
    found = faults("seed = -1\n" + MINIMAL, override)
    assert list(found) == [f"--set {override}", "seed"]


KEYS = sorted({key for key, _, _ in positions(schema_tree())})
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.sampled_from(["sgd", "adam", "iid", "natural", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(document=st.dictionaries(st.sampled_from(list(Experiment.model_fields)), VALUES))
def test_every_fault_can_be_worded(document):
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate({**document, "odd": 1})
    assert "odd" in {fault.path for fault in faults_of(caught.value, document, {"data.name": "data.name=x"})}


def test_a_question_ends_a_sentence(faults):
    fault = str(faults(MINIMAL, 'compression.up=["int9"]')["compression.up[0]"])
    assert "expected a known stage. Did you mean int8? Set by --set" in fault
