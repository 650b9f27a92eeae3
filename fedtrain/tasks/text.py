"""Language models that predict the next token at every position.

Both are made of linear layers, embeddings and normalisation only: DP-SGD can take neither `nn.LSTM` nor
`nn.MultiheadAttention`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.checks import needs_tokens, positive_int
from fedtrain.tasks.dropout import chance
from fedtrain.tasks.objectives import NextToken

__all__ = ["CharLstm", "Transformer"]


class CharLstm(NextToken):
    """Stacked LSTM over characters.

    Args:
        spec: text: tokens `(T,)` with one target each.
        embedding: width of the characters' embedding.
        hidden: width of each LSTM layer.
        layers: LSTM layers.
        dropout: chance that training leaves out an output of an LSTM layer (Zaremba et al. 2014).

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    def __init__(
        self, spec: DataSpec, embedding: int = 8, hidden: int = 256, layers: int = 2, *, dropout: float = 0.0
    ) -> None:
        needs_tokens("char-lstm", spec)
        self.spec = spec
        self.embedding = positive_int("embedding", embedding)
        self.hidden = positive_int("hidden", hidden)
        self.layers = positive_int("layers", layers)
        self.dropout = chance(dropout)

    def model(self) -> nn.Module:
        """Embedding, LSTM layers and a linear layer; `(B, T)` tokens to `(B, T, tokens)` logits."""
        model = nn.Sequential()
        model.add_module("embedding", nn.Embedding(self.spec.num_classes, self.embedding))
        for number in range(1, self.layers + 1):
            width = self.embedding if number == 1 else self.hidden
            model.add_module(f"lstm{number}", _Lstm(width, self.hidden))
            if self.dropout:
                model.add_module(f"dropout{number}", nn.Dropout(self.dropout))
        model.add_module("fc", nn.Linear(self.hidden, self.spec.num_classes))
        return model


class Transformer(NextToken):
    """Small causal transformer with pre-normalisation and learned positions.

    Args:
        spec: text: tokens `(T,)` with one target each; T is the longest text that the model takes.
        width: width of the embeddings; a multiple of `heads`.
        layers: transformer blocks.
        heads: attention heads.
        dropout: chance that training leaves out a number of the embeddings, or of what a block adds to its input.

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017.
        Xiong et al., On Layer Normalization in the Transformer Architecture, ICML 2020 (pre-normalisation).
    """

    def __init__(
        self, spec: DataSpec, width: int = 128, layers: int = 2, heads: int = 4, *, dropout: float = 0.0
    ) -> None:
        needs_tokens("transformer", spec)
        self.spec = spec
        self.width = positive_int("width", width)
        self.layers = positive_int("layers", layers)
        self.heads = positive_int("heads", heads)
        self.dropout = chance(dropout)
        if self.width % self.heads:
            raise TaskError("the task option 'width' is wrong", got=width, expected=f"a multiple of heads = {heads}")

    def model(self) -> nn.Module:
        """Embeddings, blocks, a normalisation and a linear layer; `(B, T)` tokens to `(B, T, tokens)` logits."""
        tokens = self.spec.num_classes
        model = nn.Sequential()
        model.add_module("embedding", _PositionedEmbedding(tokens, self.spec.input_shape[0], self.width))
        if self.dropout:
            model.add_module("dropout", nn.Dropout(self.dropout))
        for number in range(1, self.layers + 1):
            model.add_module(f"block{number}", _Block(self.width, self.heads, self.dropout))
        model.add_module("norm", nn.LayerNorm(self.width))
        model.add_module("fc", nn.Linear(self.width, tokens))
        return model


class _Lstm(nn.Module):
    """One LSTM layer, `(B, T, width)` to `(B, T, hidden)`, starting from zero; gates in torch's order.

    It equals `nn.LSTM` with one bias in place of the sum of two.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.stacked = {"inputs": 4, "recurrent": 4}  # matrices of each gate, for [model] init
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, sequence: Tensor) -> Tensor:
        start = sequence.new_zeros(len(sequence), self.recurrent.in_features)
        # DP-SGD takes each example's gradient by hooks on the linear layers, and LoRA puts others in their place: then
        # they must be called step by step. Else torch's fused kernel gives the same two to three times as fast.
        if any(type(m) is not nn.Linear or m._forward_hooks for m in (self.inputs, self.recurrent)):
            return self._stepwise(sequence, start)
        weight, bias = self.inputs.weight, self.inputs.bias
        weights = [weight, self.recurrent.weight, bias, torch.zeros_like(bias)]
        state = [start[None], start[None]]
        with warnings.catch_warnings():
            # cuDNN copies separate weights into one block at every call, which is cheap for one layer, and says so.
            warnings.filterwarnings("ignore", "RNN module weights")
            hidden, _, _ = torch.lstm(sequence, state, weights, True, 1, 0.0, self.training, False, True)
        return hidden

    def _stepwise(self, sequence: Tensor, start: Tensor) -> Tensor:
        hidden = cell = start
        outputs = []
        for step in self.inputs(sequence).unbind(1):
            write, forget, candidate, read = (step + self.recurrent(hidden)).chunk(4, 1)
            cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
            hidden = read.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, 1)


class _PositionedEmbedding(nn.Module):
    """Sum of the embeddings of each token and of its position."""

    def __init__(self, tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # One row of positions per example: per-sample gradients need the batch dimension.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        embedded: Tensor = self.token(tokens) + self.position(positions)
        return embedded


class _Block(nn.Module):
    """Causal self-attention and a feed-forward network, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.stacked = {"attention_in": 3}  # query, key and value
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, sequence: Tensor) -> Tensor:
        sequence = sequence + self._drop(self._attend(self.norm1(sequence)))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(sequence))))
        return sequence + self._drop(hidden)

    def _drop(self, added: Tensor) -> Tensor:
        return added if self.dropout is None else self.dropout(added)

    def _attend(self, sequence: Tensor) -> Tensor:
        # (B, T, width) -> query, key, value of (B, heads, T, width / heads) each
        projected = self.attention_in(sequence).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return output
