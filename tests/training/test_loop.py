from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import Examples
from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.seeds import generator
from fedtrain.tasks.base import Metric
from fedtrain.training.loop import Assignment, LocalResult, Recipe, Trainer
from fedtrain.training.optimizer import LocalOptimizer
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart, Tensors

SEED = 5
CPU = torch.device("cpu")


@dataclass
class Squares:
    """Squared error of any model; remembers the targets of each batch."""

    build: Callable[[], nn.Module]
    channels_last: bool = False
    batches: list[list[float]] = field(default_factory=list)

    def model(self) -> nn.Module:
        return self.build()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.batches.append(targets.tolist())
        return F.mse_loss(outputs.flatten(), targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {}


def trainer(task: Squares, rule: LocalRule | None = None, lr: float = 0.1, **section: int) -> Trainer:
    training = TrainingSection.model_validate({"optimizer": SgdSection(lr=lr), **section})
    return Trainer(task, Recipe(training, rule), SEED, CPU)


def initial(of: Trainer) -> dict[str, Tensor]:
    return P.snapshot(P.exchanged(of.model))


def train(
    with_: Trainer, examples: Examples, start: P.Params | None = None, who: str = "a", when: int = 1
) -> LocalResult:
    start = start or initial(with_)
    return with_.train(Assignment(when, who, start), examples)


def line() -> nn.Module:
    return nn.Linear(1, 1)


def slope() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def draw(count: int, *shape: int) -> Examples:
    rng = torch.Generator().manual_seed(1)
    return Examples(torch.randn(count, *shape, generator=rng), torch.randn(count, generator=rng))


def assert_same(one: LocalResult, other: LocalResult) -> None:
    assert one.delta.keys() == other.delta.keys()
    assert all(torch.equal(one.delta[name], other.delta[name]) for name in one.delta)
    assert one.loss == other.loss


def test_one_full_batch_step_by_hand() -> None:
    start = {"weight": torch.tensor([[1.0]]), "bias": torch.tensor([0.0])}
    examples = Examples(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    result = trainer(Squares(line)).train(Assignment(1, "a", start, rate=lambda _: 0.5), examples)
    # Squared errors 1 and 4; slopes (2*1*1 + 2*2*2)/2 = 5 and (2*1 + 2*2)/2 = 3; learning rate 0.1 * 0.5.
    assert result.delta["weight"].item() == pytest.approx(-0.25)
    assert result.delta["bias"].item() == pytest.approx(-0.15)
    assert (result.num_examples, result.loss) == (2, 2.5)
    assert start["weight"].item() == 1.0


def test_it_equals_a_plain_torch_loop() -> None:
    examples, optimizer = draw(10, 3), SgdSection(lr=0.05, momentum=0.9, weight_decay=0.1)
    section = TrainingSection(optimizer=optimizer, batch_size=4, local_epochs=2)
    ours = Trainer(Squares(perceptron), Recipe(section), SEED, CPU)
    start = initial(ours)
    model = perceptron()
    model.load_state_dict(start)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    rng = generator(SEED, "batches", 3, "a")
    for _ in range(2):
        for rows in np.split(rng.permutation(10), [4, 8]):
            sgd.zero_grad()
            F.mse_loss(model(examples.inputs[rows]).flatten(), examples.targets[rows]).backward()  # type: ignore[no-untyped-call]
            sgd.step()
    delta = train(ours, examples, start, when=3).delta
    for name, value in model.state_dict().items():
        torch.testing.assert_close(delta[name], value - start[name], rtol=0, atol=1e-6)


def test_each_pass_sees_every_example_once_and_its_last_batch_is_smaller() -> None:
    task = Squares(line)
    train(trainer(task, batch_size=2, local_epochs=2), Examples(torch.ones(5, 1), torch.arange(5.0)))
    assert [len(batch) for batch in task.batches] == [2, 2, 1, 2, 2, 1]
    first, second = (list(chain(*batches)) for batches in (task.batches[:3], task.batches[3:]))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second


@pytest.mark.parametrize(("steps", "sizes"), [(2, [2, 2]), (4, [2, 2, 1, 2]), (7, [2, 2, 1, 2, 2, 1, 2])])
def test_local_steps_are_exact_and_repeat_passes(steps: int, sizes: list[int]) -> None:
    task = Squares(line)
    train(trainer(task, batch_size=2, local_steps=steps), Examples(torch.ones(5, 1), torch.arange(5.0)))
    assert [len(batch) for batch in task.batches] == sizes


def test_the_loss_is_a_mean_over_examples_not_over_batches() -> None:
    start = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    examples = Examples(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))
    frozen = trainer(Squares(line), lr=1e-30, batch_size=2)
    assert train(frozen, examples, start).loss == pytest.approx((1 + 4 + 9) / 3)


class Counting(nn.Module):
    """What a module may keep: a counter, a scratch buffer that is not saved, and a mean that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=None)  # its step is 1 / (batches seen so far)
        self.out = nn.Linear(3, 1)
        self.register_buffer("calls", torch.tensor(0.0), persistent=False)
        self.register_buffer("mean", torch.tensor(0.0))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * inputs.mean()
        return torch.as_tensor(self.out(self.norm(inputs)) * self.calls + self.mean)


@pytest.mark.parametrize("build", [perceptron, Counting])
def test_earlier_clients_leave_no_trace(build: Callable[[], nn.Module]) -> None:
    fresh, used = (trainer(Squares(build), batch_size=5) for _ in range(2))
    start = initial(fresh)
    elsewhere = {name: value + 1 for name, value in start.items()}
    train(used, Examples(draw(9, 3).inputs + 2, torch.ones(9)), elsewhere, who="b", when=7)
    assert_same(train(used, draw(10, 3), start), train(fresh, draw(10, 3), start))


def test_a_buffer_that_the_model_replaces_is_part_of_the_delta() -> None:
    counting = trainer(Squares(Counting))
    delta = train(
        counting, Examples(torch.full((4, 3), 8.0), torch.zeros(4)), {**initial(counting), "mean": torch.tensor(2.0)}
    )
    assert delta.delta["mean"].item() == 3.0  # (2 + 8) / 2 - 2


def test_dropout_is_a_function_of_round_and_client() -> None:
    # Equal examples: the order of the rows makes no difference, only dropout does.
    alike = Examples(torch.ones(8, 3), torch.ones(8))
    dropping = trainer(Squares(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))))
    start = initial(dropping)

    def weight(who: str, when: int) -> list[float]:
        torch.manual_seed(len(who) + when)  # whatever the process drew before
        return [float(value) for value in train(dropping, alike, start, who, when).delta["1.weight"].flatten()]

    assert weight("a", 1) == weight("a", 1)
    assert weight("a", 1) != weight("b", 1)
    assert weight("a", 1) != weight("a", 2)


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.used(self.frozen(inputs)))


def test_unused_parameters_stay_and_frozen_ones_do_not_travel() -> None:
    delta = train(trainer(Squares(Partly)), draw(4, 1)).delta
    assert delta.keys() == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
    assert delta["unused.weight"].item() == 0.0
    assert delta["used.weight"].item() != 0.0


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3), nn.Linear(12, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.conv(images).view(len(images), -1)))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1))


def test_a_model_may_view_after_a_convolution() -> None:
    train(trainer(Squares(Viewing)), draw(4, 2, 4, 4))


def test_a_delta_is_contiguous_whatever_the_layout() -> None:
    one, other = (train(trainer(Squares(convolution, last)), draw(4, 2, 4, 4)).delta for last in (True, False))
    assert all(value.is_contiguous() for value in one.values())
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def proximal(mu: float) -> LocalRule:
    def correct(start: LocalStart, now: Tensors, gradients: Tensors) -> Tensors:
        return [g + mu * (w - w0) for w0, w, g in zip(start.values, now, gradients, strict=True)]

    return LocalRule(begin=lambda start: start, correct_gradient=correct)


@pytest.mark.parametrize(("mu", "end"), [(0.0, 0.512), (10.0, 0.832)])
def test_a_rule_corrects_each_gradient_by_hand(mu: float, end: float) -> None:
    # Error w**2, slope 2w, rate 0.1, three steps from w = 1: 0.8, 0.64, 0.512; with a pull of 10 * (w - 1) towards the
    # server's: 0.8, then 0.8 - 0.1 * (1.6 - 2) = 0.84, then 0.84 - 0.1 * (1.68 - 1.6) = 0.832.
    pulled = trainer(Squares(slope), proximal(mu), local_steps=3)
    result = train(pulled, Examples(torch.ones(1, 1), torch.zeros(1)), {"weight": torch.ones(1, 1)})
    assert 1 + result.delta["weight"].item() == pytest.approx(end)


def test_autograd_keeps_no_record_of_what_a_rule_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[bool] = []

    def step(_optimizer: LocalOptimizer, gradients: Tensors, _factor: float) -> None:
        stepped.extend(gradient.requires_grad for gradient in gradients)

    monkeypatch.setattr(LocalOptimizer, "step", step)
    pulled = trainer(Squares(slope), proximal(1.0), local_steps=3)
    train(pulled, Examples(torch.ones(1, 1), torch.zeros(1)), {"weight": torch.ones(1, 1)})
    assert stepped == [False] * 3


def test_a_strong_pull_holds_the_model_where_the_server_left_it() -> None:
    free, held = (trainer(Squares(perceptron), rule, lr=1e-3, local_steps=100) for rule in (None, proximal(1e3)))
    assert P.l2_norm(train(held, draw(10, 3)).delta) < 0.02 * P.l2_norm(train(free, draw(10, 3)).delta)


def test_a_rule_that_does_nothing_equals_none_bit_for_bit() -> None:
    ruled, plain = (trainer(Squares(perceptron), rule, batch_size=4, local_epochs=2) for rule in (proximal(0.0), None))
    assert_same(train(ruled, draw(10, 3)), train(plain, draw(10, 3)))


def test_partial_work_is_the_first_part_of_the_steps() -> None:
    part, whole = (Squares(line) for _ in range(2))
    for task, work in ((part, 0.5), (whole, 1.0)):
        of = trainer(task, batch_size=2, local_epochs=2)
        of.train(Assignment(1, "a", initial(of), work=work), Examples(torch.ones(5, 1), torch.arange(5.0)))
    assert part.batches == whole.batches[:3]  # of six
    of = trainer(Squares(line), local_steps=1)
    of.train(Assignment(1, "a", initial(of), work=0.01), draw(4, 1))  # at least one step


def test_a_rule_is_told_what_it_may_use_and_what_it_gives_goes_on() -> None:
    told: list[LocalStart] = []

    def begin(start: LocalStart) -> LocalStart:
        told.append(start)
        return start

    def finish(start: LocalStart, end: LocalEnd) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {"steps": torch.tensor(end.steps)}, {"rounds": start.kept.get("rounds", 0) + 1, "last": end.values[0]}

    of = trainer(Squares(slope), LocalRule(begin, finish=finish), local_steps=3, lr=0.1)
    examples, start = Examples(torch.ones(2, 1), torch.tensor([0.0, 4.0])), {"weight": torch.ones(1, 1)}
    first = of.train(Assignment(1, "a", start, shared={"c": torch.tensor(5.0)}, rate=lambda _: 0.5), examples)
    assert (told[0].names, told[0].lr, told[0].shared["c"].item()) == (["weight"], 0.05, 5.0)
    assert told[0].values[0].tolist() == [[1.0]]  # still, after the steps
    assert told[0].mean_loss() != 5.0  # of the model as it is when asked: (1 + 9) / 2 at the start
    assert first.extra["steps"].item() == 3
    kept = first.kept["rule"]
    assert (kept["rounds"], kept["last"].tolist()) == (1, (start["weight"] + first.delta["weight"]).tolist())
    assert of.train(Assignment(2, "a", start, kept=first.kept), examples).kept["rule"]["rounds"] == 2


def test_the_loss_that_a_rule_asks_for_is_that_of_the_servers_model() -> None:
    losses: list[float] = []
    of = trainer(Squares(slope), LocalRule(lambda start: losses.append(start.mean_loss())), local_steps=3)
    of.train(Assignment(1, "a", {"weight": torch.ones(1, 1)}), Examples(torch.ones(2, 1), torch.tensor([0.0, 4.0])))
    assert losses == [5.0]  # (1 + 9) / 2


def private(*patterns: str) -> Trainer:
    training = TrainingSection(local_steps=2, optimizer=SgdSection(lr=0.1))
    return Trainer(Squares(perceptron), Recipe(training, private=patterns), SEED, CPU)


def shared_part(of: Trainer) -> dict[str, Tensor]:
    return {name: t for name, t in initial(of).items() if not name.startswith("2.")}


def test_private_parameters_train_stay_and_are_found_again() -> None:
    of = private("2.*")
    start, head = shared_part(of), initial(of)["2.weight"]
    first = of.train(Assignment(1, "a", start), draw(6, 3))
    assert first.delta.keys() == start.keys()
    assert not torch.equal(first.kept["private"]["2.weight"], head)
    again = of.train(Assignment(2, "a", start, kept=first.kept), draw(6, 3))
    anew = of.train(Assignment(2, "a", start), draw(6, 3))
    assert not torch.equal(again.delta["0.weight"], anew.delta["0.weight"])
    of.load(start, first.kept)
    assert torch.equal(P.exchanged(of.model)["2.weight"], first.kept["private"]["2.weight"])
    of.load(start, {})  # another client's head is forgotten
    assert torch.equal(P.exchanged(of.model)["2.weight"], head)


def test_a_rule_does_not_see_private_parameters() -> None:
    seen: list[int] = []

    def correct(_: object, now: Tensors, gradients: Tensors) -> Tensors:
        seen.append(len(gradients))
        return [torch.zeros_like(g) for g in gradients]

    training = TrainingSection(local_steps=1, optimizer=SgdSection(lr=0.1))
    rule = LocalRule(lambda start: start.names, correct)
    of = Trainer(Squares(perceptron), Recipe(training, rule, private=("0.*",)), SEED, CPU)
    start = {name: t for name, t in initial(of).items() if name.startswith("2.")}
    result = of.train(Assignment(1, "a", start), draw(6, 3))
    assert seen == [2]
    assert P.l2_norm(result.delta) == 0.0  # the rule took their gradients away
    assert not torch.equal(result.kept["private"]["0.weight"], initial(of)["0.weight"] * 0)


def test_a_personal_model_goes_its_own_way_and_the_global_update_does_not_notice() -> None:
    training = TrainingSection(local_steps=3, optimizer=SgdSection(lr=0.1))
    plain = Trainer(Squares(perceptron), Recipe(training), SEED, CPU)
    both = Trainer(Squares(perceptron), Recipe(training, personal_rule=proximal(0.0)), SEED, CPU)
    start, examples = initial(plain), draw(8, 3)
    first = both.train(Assignment(1, "a", start), examples)
    assert_same(first, plain.train(Assignment(1, "a", start), examples))
    second = both.train(Assignment(2, "a", start, kept=first.kept), examples)
    far, near = (P.l2_norm(P.difference(result.kept["personal"], start)) for result in (second, first))
    assert far > near > 0  # it went on from where it was, though the server's model did not move
    both.personalize(Assignment(2, "a", start, kept=second.kept), examples, 0)
    assert all(torch.equal(t, second.kept["personal"][n]) for n, t in P.exchanged(both.model).items())
    both.personalize(Assignment(2, "b", start), examples, 0)  # a client that never trained
    assert all(torch.equal(t, start[n]) for n, t in P.exchanged(both.model).items())


def test_fine_tuning_trains_a_copy_of_the_global_model() -> None:
    of = trainer(Squares(perceptron), local_steps=50)
    start, examples = initial(of), draw(8, 3)
    of.personalize(Assignment(3, "a", start), examples, 2)
    tuned = P.snapshot(P.exchanged(of.model))
    assert 0 < P.l2_norm(P.difference(tuned, start)) < 1
    of.personalize(Assignment(3, "a", start, rate=lambda _: 0.01, work=0.1), examples, 2)  # at the end of a schedule
    assert all(torch.equal(t, tuned[n]) for n, t in P.exchanged(of.model).items())


def test_a_personal_model_keeps_its_own_private_part() -> None:
    training = TrainingSection(local_steps=3, optimizer=SgdSection(lr=0.1))
    of = Trainer(Squares(perceptron), Recipe(training, None, proximal(0.0), ("2.*",)), SEED, CPU)
    kept = of.train(Assignment(1, "a", shared_part(of)), draw(8, 3)).kept
    kept = of.train(Assignment(2, "a", shared_part(of), kept=kept), draw(8, 3)).kept
    assert not torch.equal(kept["personal"]["2.weight"], kept["private"]["2.weight"])
    of.personalize(Assignment(2, "a", shared_part(of), kept=kept), draw(8, 3), 0)
    assert all(torch.equal(t, kept["personal"][n]) for n, t in P.exchanged(of.model).items())
