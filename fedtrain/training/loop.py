"""One client's local training: from the server's parameters to a delta."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import Examples
from fedtrain.errors import PrivacyError, RunError
from fedtrain.experiment.model import ModelSection
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.seeds import generator, global_torch_seed, seed_of
from fedtrain.tasks.base import Task
from fedtrain.tasks.hook import relabel_of, relabelled
from fedtrain.tasks.modelling import trains_in
from fedtrain.training.augment import Augmenter
from fedtrain.training.batches import batches, easiest
from fedtrain.training.evaluation import evaluate
from fedtrain.training.gradients import BatchGradients, Losses, MeanGradients, PlainGradients
from fedtrain.training.layout import in_layout, memory_format
from fedtrain.training.moments import read_moments, register_moments, write_moments
from fedtrain.training.optimizer import LocalOptimizer
from fedtrain.training.parallel import ParallelGradients, Replicas
from fedtrain.training.penalty import penalized
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart, Tensors

__all__ = ["Assignment", "LocalResult", "Recipe", "Trainer", "build_model"]

_LOSS_BATCH = 1000  # examples per forward pass where a rule asks for the mean loss; part of it to the last bit


@dataclass(frozen=True)
class Recipe:
    """How every client trains.

    Attributes:
        training: the experiment's training section.
        rule: the strategy's client half; None trains plainly.
        personal_rule: by which a personal model is trained beside the global one; None for no such model. It needs no
            `finish`: the model itself is all that is kept.
        private: patterns of parameter names that never leave the client, such as "head.*".
        model: the experiment's model section: which parameters are trained from which round on.
        privacy: clients train by DP-SGD; None for plainly.
        replicas: the devices that share each batch; None for one device.
    """

    training: TrainingSection
    rule: LocalRule | None = None
    personal_rule: LocalRule | None = None
    private: tuple[str, ...] = ()
    privacy: SamplePrivacy | None = None
    model: ModelSection = field(default_factory=ModelSection)
    replicas: Replicas | None = None


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round.

    Attributes:
        round_number: names the random streams.
        client_id: names the random streams.
        params: the server's tensors: those of the model that are exchanged.
        shared: what the strategy sent beside them.
        kept: what this client kept from its last round; empty in the first.
        rate: share of the round's steps done, 0 to 1 -> factor of the learning rate.
        work: share of the local steps that there is time for; at least one step is taken.
        charge: what the round spends, where the recipe is private; its steps are those taken.
    """

    round_number: int
    client_id: str
    params: Params
    shared: Params = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    rate: Callable[[float], float] = lambda _: 1.0
    work: float = 1.0
    charge: Spend | None = None


@dataclass(frozen=True)
class LocalResult:
    """What local training produced.

    Attributes:
        delta: trained parameters minus the server's, contiguous CPU tensors.
        num_examples: examples in the client's training set.
        loss: mean training loss over the examples seen, while the model changed; NaN where the recipe is private.
        extra: what the strategy wants beside the delta.
        kept: what stays on the client for its next round; empty if nothing does.
    """

    delta: dict[str, Tensor]
    num_examples: int
    loss: float
    extra: Params
    kept: Mapping[str, Any]


@dataclass(frozen=True)
class _Phase:
    """A training of one model in a client's round: the global, the personal or the fine-tuned one."""

    stream: str
    training: TrainingSection
    rule: LocalRule | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stage:
    """What is trained in some rounds: all, or what is not frozen then.

    Attributes:
        names: of all that is ever trained.
        params: what is trained now, in the same order.
        dp_sgd: its private gradients; None where training is plain.
    """

    names: Sequence[str]
    params: Mapping[str, Tensor]
    dp_sgd: PrivateGradients | None

    def expand(self, gradients: Tensors, whole: Sequence[Tensor]) -> Tensors:
        """Gradients of all that is ever trained: zero for what is frozen now."""
        if len(self.params) == len(self.names):
            return gradients
        given = dict(zip(self.params, gradients, strict=True))
        return [given[name] if name in given else torch.zeros_like(t) for name, t in zip(self.names, whole)]

    def select(self, gradients: Tensors) -> Tensors:
        """Of gradients of all, those of what is trained now."""
        return [g for name, g in zip(self.names, gradients, strict=True) if name in self.params]


def build_model(task: Task, seed: int) -> nn.Module:
    """Build the task's model with the initial weights of this run: the same on the server and on every client."""
    with global_torch_seed(seed, "model"):
        model = task.model()
    training = getattr(task, "training", None)
    if isinstance(training, TrainingSection):
        register_moments(model, training)
    return model


class Trainer:
    """Trains one client after another in one model.

    The result depends on the arguments of `train` alone, not on which clients this trainer served before.

    Args:
        task: model and loss.
        recipe: how to train.
        seed: the experiment's seed.
        device: where to train.
        on_step: is called after each step, for those who watch.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self._on_step = on_step
        self._task, self._recipe, self._seed, self._device = task, recipe, seed, device
        self.model = build_model(task, seed).to(device)
        self._layout = memory_format(task)
        self.model.to(memory_format=self._layout)  # type: ignore[call-overload]
        own = BatchGradients(self.model, task, recipe.training, device)
        self._compute: MeanGradients = ParallelGradients(own, recipe.replicas) if recipe.replicas else own
        travelling = P.exchanged(self.model)
        self._private = [name for name in travelling if P.is_private(name, recipe.private)]
        self._shared_names = travelling.keys() - set(self._private)
        # What an earlier client may have left in the model, with its initial value.
        staying = {n: b for n, b in self.model.named_buffers() if n not in travelling}
        self._initial = {n: t.clone() for n, t in (staying | {n: travelling[n] for n in self._private}).items()}
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._names = [name for name in trained if name not in self._private]
        # The private ones last, for a rule sees only those before them.
        self._all_names = sorted(trained, key=self._private.__contains__)
        self._trained: list[Tensor] = [trained[name] for name in self._all_names]
        self._stages: dict[frozenset[str], _Stage] = {}
        self._noise = NoiseSource() if recipe.privacy else None

    def load(self, values: Params, kept: Mapping[str, Any]) -> None:
        """Write the server's parameters and a client's private ones into the model; forget all earlier clients."""
        if self._initial:
            tensors = dict(self.model.named_buffers()) | P.exchanged(self.model)
            for name, initial in self._initial.items():
                tensors[name].copy_(initial)
        P.load(self.model, {**values, **kept.get("private", {})})

    def train(self, assignment: Assignment, examples: Examples) -> LocalResult:
        """Train from the server's parameters on one client's examples, which must not be empty."""
        kept = assignment.kept
        if assignment.params.keys() != self._shared_names:
            odd = sorted(assignment.params.keys() ^ self._shared_names)[0]
            raise RunError("the server sent other tensors than the model exchanges", got=odd)
        self.load(assignment.params, kept)
        examples = self._place(examples)
        phase = _Phase("batches", self._recipe.training, self._recipe.rule, kept)
        loss, extra, keep = self._fit(assignment, examples, phase)
        after = P.exchanged(self.model)  # named anew: a model may put new buffers in place of the old
        delta = P.snapshot({name: after[name] for name in assignment.params})
        for name, t in delta.items():
            t.sub_(assignment.params[name])
        if self._private:
            keep["private"] = P.snapshot({name: after[name] for name in self._private})
        if self._recipe.personal_rule:
            self._load_personal(assignment)
            self._fit(assignment, examples, _Phase("personal", self._recipe.training, self._recipe.personal_rule))
            keep["personal"] = P.snapshot(P.exchanged(self.model))
        return LocalResult(delta, len(examples), loss, P.snapshot(extra), keep)

    def personalize(self, assignment: Assignment, examples: Examples, epochs: int) -> None:
        """Put the client's own model in place: the one it trains beside the global one, or a fine-tuned copy of that.

        A client that has not trained yet has the global one.

        Args:
            assignment: the client and the server's parameters.
            examples: the client's training set.
            epochs: passes of fine-tuning, at the full learning rate; 0 for none.
        """
        self._load_personal(assignment)
        if epochs and len(examples):
            training = self._recipe.training.model_copy(update={"local_epochs": epochs, "local_steps": None})
            whole = replace(assignment, rate=lambda _: 1.0, work=1.0)
            self._fit(whole, self._place(examples), _Phase("fine-tune", training))

    def _load_personal(self, assignment: Assignment) -> None:
        personal = assignment.kept.get("personal")  # all of a model, private parameters too
        self.load(personal or assignment.params, {} if personal else assignment.kept)

    def _fit(self, assignment: Assignment, examples: Examples, phase: _Phase) -> tuple[float, Params, dict[str, Any]]:
        """Train the model as it stands; return the mean loss, what goes with the update, and what stays here."""
        rule, training = phase.rule, phase.training
        if relabel_of(self._task):
            with global_torch_seed(self._seed, "relabel", phase.stream, assignment.round_number, assignment.client_id):
                examples = relabelled(self._task, self.model, examples)
        state = rule.begin(self._start(assignment, examples, phase)) if rule else None
        correct = rule.correct_gradient if rule else None
        ruled = len(self._names)
        stage = self._stage(assignment.round_number)
        if training.curriculum:
            examples = easiest(training.curriculum, assignment.round_number, examples, self.model, self._task)
        self.model.train()
        averaged = training.optimizer_state == "average" and phase.stream == "batches"
        moments = read_moments(self.model) if averaged else phase.kept.get("optimizer", {})
        optimizer = LocalOptimizer(training, stage.params, _moved(moments, self._device))
        losses = Losses(self._device)
        steps = training.steps_for(len(examples), assignment.work)
        source = self._plain_gradients(assignment, examples, phase, stage, losses)
        seed = self._seed
        if stage.dp_sgd:
            assert assignment.charge is not None, "whoever trains privately has paid for it"
            noise, seed = self._randomness(assignment)
            steps = assignment.charge.steps
            augmenter = self._augmenter(seed, assignment, phase)
            changed = augmenter.inputs if augmenter else None
            source = stage.dp_sgd.steps(examples.inputs, examples.targets, assignment.charge, noise, changed)
        with global_torch_seed(seed, "dropout", phase.stream, assignment.round_number, assignment.client_id):
            for number, gradients in enumerate(source):
                if correct:
                    whole = stage.expand(gradients, self._trained)
                    corrected = correct(state, self._trained[:ruled], whole[:ruled])
                    # A user's rule may compute with the live parameters, of which autograd would keep a record.
                    gradients = stage.select([*(g.detach() for g in corrected), *whole[ruled:]])
                gradients = penalized(training.penalty, stage.params, gradients)
                optimizer.step(gradients, assignment.rate(number / steps))
                if self._on_step:
                    self._on_step()
        if averaged:
            write_moments(self.model, optimizer.state())
        keep: dict[str, Any] = {"optimizer": optimizer.state()} if training.optimizer_state == "keep" else {}
        if rule is None or rule.finish is None:
            return losses.mean(), {}, keep
        extra, rule_kept = rule.finish(state, LocalEnd([p.detach().clone() for p in self._trained[:ruled]], steps))
        return losses.mean(), extra, {**keep, "rule": rule_kept} if rule_kept else keep

    def _stage(self, round_number: int) -> _Stage:
        """What is trained in a round."""
        model = self._recipe.model
        names = frozenset(name for name in self._all_names if trains_in(model, name, round_number))
        if names not in self._stages:
            params = {n: p for n, p in zip(self._all_names, self._trained, strict=True) if n in names}
            private = None
            if self._recipe.privacy:
                private = PrivateGradients(self.model, self._task.loss, list(params.values()), self._recipe.privacy)
            self._stages[names] = _Stage(self._all_names, params, private)
        return self._stages[names]

    def _plain_gradients(
        self, assignment: Assignment, examples: Examples, phase: _Phase, stage: _Stage, losses: Losses
    ) -> Iterator[Tensors]:
        """Yield the gradient of each batch's mean loss, for the model as it stands then."""
        steps = phase.training.steps_for(len(examples), assignment.work)
        rng = generator(self._seed, phase.stream, assignment.round_number, assignment.client_id)
        plain = PlainGradients(self._compute, phase.training)
        augmenter = self._augmenter(self._seed, assignment, phase)
        trained = list(stage.params.values())
        for batch in batches(examples, phase.training.batch_size, steps, rng, phase.training.balance):
            changed = augmenter.batch(batch) if augmenter else batch
            yield plain.of(changed, trained, losses)

    def _augmenter(self, seed: int, assignment: Assignment, phase: _Phase) -> Augmenter | None:
        """What changes the batches of a phase at random; None for nothing."""
        if not phase.training.augment:
            return None
        rng = generator(seed, "augment", phase.stream, assignment.round_number, assignment.client_id)
        return Augmenter(phase.training.augment, rng, self._layout)

    def _randomness(self, assignment: Assignment) -> tuple[NoiseSource, int]:
        """Where noise and coins come from, and the seed of all else: secret, unless the experiment gives a noise seed.

        Whoever knew the dropout of each place in a batch would see examples move when one is left out.
        """
        assert self._recipe.privacy is not None
        assert self._noise is not None
        seed = self._recipe.privacy.noise_seed
        if seed is None:
            return self._noise, secrets.randbits(63)
        seed = seed_of(seed, "noise", assignment.round_number, assignment.client_id)
        return NoiseSource(seed), seed

    def _start(self, assignment: Assignment, examples: Examples, phase: _Phase) -> LocalStart:
        def mean_loss() -> float:
            if self._recipe.privacy:
                raise PrivacyError("under privacy a strategy's rule must not ask for the mean loss: it has no noise")
            return evaluate(self.model, self._task, examples, _LOSS_BATCH)["loss"]

        return LocalStart(
            names=self._names,
            values=[assignment.params[name].to(self._device, copy=True) for name in self._names],
            shared=_moved(assignment.shared, self._device),
            kept=_moved(phase.kept.get("rule", {}), self._device),
            lr=phase.training.optimizer.lr * assignment.rate(0.0),
            mean_loss=mean_loss,
        )

    def _place(self, examples: Examples) -> Examples:
        inputs, targets = examples.inputs.to(self._device), examples.targets.to(self._device)
        return Examples(in_layout(inputs, self._layout), targets)


def _moved(state: Any, device: torch.device) -> Any:
    """The same state with its tensors on a device."""
    if isinstance(state, Mapping):
        return {name: _moved(value, device) for name, value in state.items()}
    return state.to(device) if isinstance(state, Tensor) else state
