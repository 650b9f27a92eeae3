"""Whether DP-SGD can take a model: by what it is made of, and by what it does with a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedtrain.errors import FedtrainError, TaskError
from fedtrain.params import exchanged
from fedtrain.privacy.clipping import Engine, Layer
from fedtrain.seeds import global_torch_seed

__all__ = ["Trial", "check_layers"]

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
                f"DP-SGD cannot take {name}: its rows change with the batch",
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


class Trial:
    """Try a model on a few examples, and an engine on the model.

    An example's loss must not change with the others in its batch, nor may training change a buffer: there would be no
    noise on either. And the engine must find the gradients that autograd finds for one example at a time.

    Args:
        model: in training mode.
        loss: (outputs, targets) -> `(B,)`.
        trained: leaf parameters.
        layers: whose parameters these are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        trained: Sequence[Tensor],
        layers: Sequence[Layer],
    ) -> None:
        self._model, self._loss, self._trained, self._layers = model, loss, trained, layers

    def run(self, engine: Engine, inputs: Tensor, targets: Tensor) -> None:
        """Raise TaskError if the model or the engine fails on the first of some examples."""
        inputs, targets = inputs[:_TRIED], targets[:_TRIED]
        before = {name: b.clone() for name, b in self._model.named_buffers()}
        with torch.no_grad():
            among_others, alone = self._losses(inputs, targets)[0], self._losses(*_copies(inputs, targets))[0]
        if not torch.allclose(among_others, alone, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise TaskError(
                "DP-SGD cannot take this model: the loss of an example depends on the others in its batch",
                got=f"{float(among_others):g} among others and {float(alone):g} among copies of itself",
                hint="Normalise each example by itself, as nn.GroupNorm and nn.LayerNorm do",
            )
        for name, buffer in self._model.named_buffers():
            if name not in before or not torch.equal(buffer, before[name]):
                raise TaskError(f"DP-SGD cannot take the buffer {name}: training changes it without noise")
        try:
            self._check(engine, inputs, targets)
        except FedtrainError:
            raise
        except Exception as exc:
            raise TaskError(
                f"DP-SGD cannot take this model: {type(exc).__name__}: {exc}", hint="Try another [privacy] mode"
            ) from exc

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with _same_dropout():
            losses = self._loss(self._model(inputs), targets)
        if losses.shape != (len(inputs),):
            raise TaskError(
                "the loss must give one number per example",
                got=f"shape {tuple(losses.shape)} for {len(inputs)} examples",
                expected=f"shape ({len(inputs)},)",
            )
        return losses

    def _check(self, engine: Engine, inputs: Tensor, targets: Tensor) -> None:
        """Compare the first and the last example's gradient with autograd's; leave out what is not finite."""
        losses = self._losses(inputs, targets)
        for number in (0, len(inputs) - 1):
            with _same_dropout():
                squares, weighted = engine(inputs, targets)
            finite = squares.isfinite().all(0)
            if not finite.all():
                if finite.any():
                    self._check(engine, inputs[finite], targets[finite])
                return
            chosen = torch.zeros_like(squares)
            chosen[:, number] = 1
            expected = torch.autograd.grad(losses[number], self._trained, retain_graph=True, materialize_grads=True)
            self._compare(expected, weighted(chosen), squares[:, number])

    def _compare(self, expected: Sequence[Tensor], found: Sequence[Tensor], squares: Tensor) -> None:
        whole = float(torch.stack([g.norm() for g in expected]).norm())
        for layer, square in zip(self._layers, squares):
            want, got = (torch.cat([g[i].flatten() for i in layer.own.values()]) for g in (expected, found))
            # Wide enough for TF32; a use of a parameter that was missed leaves far more.
            allowed = 1e-2 * float(want.norm()) + 1e-3 * whole
            if not float((want - got).norm()) <= allowed or not abs(float(square.sqrt() - want.norm())) <= allowed:
                raise TaskError(
                    f"DP-SGD cannot take this model: its gradient of one example is not autograd's in {layer.name}",
                    expected="parameters that are used by calling the module that owns them",
                    hint='Give that module a forward of its own, or try [privacy] mode = "functorch"',
                )


def _copies(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As many copies of the first example."""
    return inputs[:1].expand_as(inputs).clone(), targets[:1].expand_as(targets).clone()


def _same_dropout() -> AbstractContextManager[None]:
    return global_torch_seed(0, "try-model")
