"""Whether DP-SGD can take a model: by what it is made of, and by what it does with a few examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedtrain.errors import FedtrainError, TaskError
from fedtrain.params import exchanged
from fedtrain.privacy.clipping import Engine, Subject
from fedtrain.seeds import global_torch_seed

__all__ = ["check_layers", "try_engine"]

_OWN = "fedtrain's own in fedtrain/tasks/text.py is built from nn.Linear"
_REFUSED: tuple[tuple[type[nn.Module], str, str], ...] = (
    (nn.modules.batchnorm._BatchNorm, "mixes the examples of a batch", "nn.GroupNorm or nn.LayerNorm"),
    (nn.RNNBase, "hides its steps from per-example gradients", f"an LSTM of linear layers: {_OWN}"),
    (nn.RNNCellBase, "hides its steps from per-example gradients", f"an LSTM of linear layers: {_OWN}"),
    (nn.MultiheadAttention, "hides its projections from per-example gradients", f"attention of linear layers: {_OWN}"),
    (nn.EmbeddingBag, "takes a batch without a first dimension for it", "nn.Embedding and a sum"),
)
_TRIED = 8  # examples


def check_layers(model: nn.Module, trained: Sequence[Tensor]) -> None:
    """Refuse layers that mix examples, that keep something of them, or whose gradients cannot be taken apart.

    Raises:
        TaskError: with the layer's name and what to put in its place.
    """
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        for kind, why, instead in _REFUSED:
            if isinstance(module, kind):
                raise TaskError(f"DP-SGD cannot take {name}: it {why}", hint=f"Use {instead}")
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise TaskError(
                f"DP-SGD cannot take {name}: its running statistics would leave the client without noise",
                hint="Use track_running_stats=False, or nn.GroupNorm",
            )
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            raise TaskError(
                f"DP-SGD cannot take {name}: its rows, or its gradient's, depend on the batch",
                hint="Leave out max_norm, scale_grad_by_freq and sparse",
            )
    buffers = exchanged(model).keys() - dict(model.named_parameters()).keys()
    if buffers:
        raise TaskError(
            f"DP-SGD cannot take the buffer {min(buffers)}: it would leave the client without noise",
            expected="no floating-point buffers that are saved with the model",
            hint="Register constants with persistent=False",
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise TaskError(
                f"DP-SGD cannot measure the parameter {name}", got=parameter.dtype, expected="float32 or float64"
            )
    if not trained:
        raise TaskError("DP-SGD has no parameter to train", expected="one that requires a gradient")


def try_engine(engine: Engine, subject: Subject, inputs: Tensor, targets: Tensor) -> None:
    """Try a model on random examples, and an engine on the model.

    An example's loss must not change with the others in its batch, nor with their number, nor may training change a
    buffer: there would be no noise on it. And the engine must find the gradients that autograd finds. Layers of dropout
    rest meanwhile. Where a model draws random numbers elsewhere, its batches of unequal size cannot be compared.

    Args:
        engine: for the subject.
        subject: model and loss.
        inputs: their shape and dtype are taken, and not their values: neither a failing nor its text tells of these.
        targets: likewise.

    Raises:
        TaskError: it is not so, or the model cannot be tried: it fails, or its losses are not finite.
    """
    inputs, targets = _invented(subject.model, inputs, targets)
    before = {name: b.clone() for name, b in subject.model.named_buffers()}
    try:
        with _without_dropout(subject.model):
            for place in (0, -1):
                _refuse_mixing(subject, inputs, targets, place)
            for name, buffer in subject.model.named_buffers():
                if name not in before or not torch.equal(buffer, before[name]):
                    raise TaskError(f"DP-SGD cannot take the buffer {name}: training changes it without noise")
            _check(engine, subject, inputs[:2], targets[:2])
    except FedtrainError:
        raise
    except Exception as exc:
        raise _untried(f"{type(exc).__name__}: {exc}") from exc


def _invented(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Draw numbers that most models and losses can take.

    Floats are between 0 and 1, where logarithms and roots are defined; classes are 0 or 1, which all of two classes or
    more have; and tokens have a row in each embedding, but for those of one row.
    """
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 1]
    rng = torch.Generator().manual_seed(0)

    def like(real: Tensor, below: int) -> Tensor:
        shape = (_TRIED, *real.shape[1:])
        if real.is_floating_point():
            return torch.rand(shape, generator=rng, dtype=torch.float64).to(real)
        return torch.randint(below, shape, generator=rng).to(real)

    layout = torch.contiguous_format
    if inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return like(inputs, min(rows, default=2)).contiguous(memory_format=layout), like(targets, 2)


@torch.no_grad()
def _refuse_mixing(subject: Subject, inputs: Tensor, targets: Tensor, place: int) -> None:
    """Compare an example's loss by itself, beside another, in the whole batch, and beside as many copies of itself."""
    every = list(range(len(inputs)))

    def loss(rows: list[int], draw: int = 0) -> Tensor:
        return _losses(subject, inputs[rows], targets[rows], draw)[place]

    alone = loss([every[place]])
    if not alone.isfinite():
        raise _untried(f"a loss of {float(alone)}")
    repeatable = torch.allclose(alone, loss([every[place]], draw=1))
    for rows in ([every[0], every[-1]], every):
        copies = loss([every[place]] * len(rows))
        same_others = torch.allclose(loss(rows), copies, rtol=1e-4, atol=1e-6)
        same_number = torch.allclose(copies, alone, rtol=1e-2, atol=1e-4)  # sizes differ in rounding
        if not same_others or (repeatable and not same_number):
            raise TaskError(
                "DP-SGD cannot take this model: the loss of an example depends on the others in its batch",
                hint="Normalise each example by itself, as nn.GroupNorm and nn.LayerNorm do, and leave the mean over "
                "a batch to fedtrain",
            )


def _untried(got: str) -> TaskError:
    return TaskError(
        "DP-SGD cannot try this model on random examples, as it must before it trains on real ones",
        got=got,
        expected="finite losses for floats from 0 to 1, tokens that every embedding has, and the classes 0 and 1",
        hint="Let the model take such inputs, and batches of any size, or try another [privacy] mode",
    )


def _losses(subject: Subject, inputs: Tensor, targets: Tensor, draw: int = 0) -> Tensor:
    with global_torch_seed(draw, "try-model"):
        losses = subject.loss(subject.model(inputs.clone()), targets)  # a layer may work in place
    if losses.shape != (len(inputs),):
        raise TaskError(
            "the loss must give one number per example",
            got=f"shape {tuple(losses.shape)} for {len(inputs)} examples",
            expected=f"shape ({len(inputs)},)",
        )
    return losses


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Let layers of dropout pass everything: what they draw for an example depends on its place in a batch."""
    active = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    try:
        for module in active:
            module.training = False
        yield
    finally:
        for module in active:
            module.training = True


def _check(engine: Engine, subject: Subject, inputs: Tensor, targets: Tensor) -> None:
    """Compare each example's gradient with autograd's; leave out what is not finite."""
    losses = _losses(subject, inputs, targets)
    for number in range(len(inputs)):
        with global_torch_seed(0, "try-model"):
            squares, weighted = engine(inputs.clone(), targets)
        finite = squares.isfinite().all(0)
        if not finite.all():
            if finite.any():
                _check(engine, subject, inputs[finite], targets[finite])
            return
        chosen = torch.zeros_like(squares)
        chosen[:, number] = 1
        expected = torch.autograd.grad(losses[number], subject.trained, retain_graph=True, materialize_grads=True)
        _compare(subject, expected, weighted(chosen), squares[:, number])


def _compare(subject: Subject, expected: Sequence[Tensor], found: Sequence[Tensor], squares: Tensor) -> None:
    whole = float(torch.stack([g.double().norm() for g in expected]).norm())
    for layer, square in zip(subject.layers, squares):
        want, got = (torch.cat([g[i].double().flatten() for i in layer.own.values()]) for g in (expected, found))
        # Wide enough for TF32, and for squares that vanish; a use of a parameter that was missed leaves far more.
        allowed = 1e-2 * float(want.norm()) + 1e-3 * whole + 1e-12
        if not float((want - got).norm()) <= allowed or not abs(float(square.sqrt() - want.norm())) <= allowed:
            raise TaskError(
                f"DP-SGD cannot take this model: its gradient of one example is not autograd's in {layer.name}",
                expected="parameters that are used by calling the module that owns them",
                hint='Give that module a forward of its own, or try [privacy] mode = "functorch"',
            )
