"""A chain of stages: from named tensors to one row of bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtrain.compression.entropy import Deflate, Zstd
from fedtrain.compression.lowrank import PowerSgd
from fedtrain.compression.quantise import BFloat16, Float16, Sign, Uniform
from fedtrain.compression.schema import Schema, check, nbytes
from fedtrain.compression.sparse import RandK, TopK
from fedtrain.compression.stages import Array, Coder, Draw, Field, Floats, Quantiser, Reducer
from fedtrain.errors import CodecError
from fedtrain.experiment.compression import StageSpec, parse_chain
from fedtrain.params import Params, snapshot

__all__ = ["Chain", "make_chain"]

_ENCODED = "encoded"
_FLOAT32, _BYTE = np.dtype("<f4"), np.dtype(np.uint8)


class Chain:
    """Encodes tensors of one schema, and decodes what another process encoded by the same chain.

    Tensors that are not floating-point, and those named, are lossless; so is every tensor if no stage loses anything.
    The others form one float32 vector, in the schema's order.

    Args:
        stages: in the order of `parse_chain`.
        schema: of what is encoded.
        lossless: names that no stage but the entropy coder touches, such as buffers.

    Attributes:
        identity: there are no stages; tensors travel as they are.
        biased: something is lost for good, unless error feedback brings it back.
        fixed_size: every update takes the same bytes.
    """

    def __init__(self, stages: Sequence[StageSpec], schema: Schema, lossless: Collection[str] = ()) -> None:
        by_name = {stage.name: stage for stage in _expanded(stages)}
        self.identity = not stages
        self._coder = _make_coder(by_name)
        self.fixed_size = self._coder is None
        loses = by_name.keys() - {"zstd", "deflate"}
        self._schema = schema
        self._trained = [
            name for name, (dtype, _) in schema.items() if loses and dtype.is_floating_point and name not in lossless
        ]
        self._exact = [name for name in schema if name not in self._trained]
        shapes = [schema[name][1] for name in self._trained]
        self._sizes = [math.prod(shape) for shape in shapes]
        self._reducer = _make_reducer(by_name, shapes, self._coder is not None)
        self.biased = self._reducer is not None or "sign" in by_name
        pieces: tuple[int, ...] = (sum(self._sizes),)
        if self._reducer:
            pieces = self._reducer.pieces
        elif "sign" in by_name:
            pieces = tuple(self._sizes)
        self._quantiser = _make_quantiser(by_name, pieces, self._coder is not None)
        self._beside = self._reducer.fields if self._reducer else ()
        numbers = self._quantiser.fields if self._quantiser else (Field(_FLOAT32, sum(pieces)),)
        self._fields = [*self._beside, *numbers, *(_raw_field(*schema[name]) for name in self._exact)]
        self._size = sum(field.dtype.itemsize * field.length for field in self._fields)

    def encode(
        self, params: Params, state: Mapping[str, Any], rng: np.random.Generator, *, feedback: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Encode tensors of the schema.

        Args:
            params: what to encode; lossless tensors may hold anything, the others finite numbers.
            state: what the last call returned; empty at first.
            rng: for stochastic rounding, random places and a first basis.
            feedback: whether a biased chain keeps what it loses and adds it to the next update.

        Returns:
            Contiguous tensors on the CPU, and the state for the next call: nested mappings of tensors.

        Raises:
            CodecError: the tensors are not of the schema; a number is not finite, or has become so with what was kept.
        """
        check(params, self._schema)
        if self.identity:
            return snapshot(params), {}
        vector = self._vector(params)
        next_state: dict[str, Any] = {}
        feedback = feedback and self.biased
        if feedback and "residual" in state:
            vector += _residual(state["residual"], len(vector))
        numbers, beside = vector, list[Array]()
        _must_be_finite(numbers)
        if self._reducer:
            with np.errstate(over="ignore"):
                numbers, beside, memory = self._reducer.reduce(vector, Draw(rng, state.get("warm"), feedback))
            _must_be_finite(numbers)
            if memory is not None:
                next_state["warm"] = memory
        arrays = [*beside, *(self._quantiser.quantise(numbers, rng) if self._quantiser else [numbers])]
        if feedback:
            next_state["residual"] = torch.from_numpy(vector - self._restored(arrays))
        content = self._written([*arrays, *(_raw(params[name]) for name in self._exact)])
        return {_ENCODED: torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _NOTHING}, next_state

    def decode(self, encoded: Params) -> dict[str, Tensor]:
        """Decode what `encode` of an equal chain returned.

        It needs memory in proportion to the schema, whatever `encoded` holds. What comes from lossy stages is finite.

        Raises:
            CodecError: it was not made by `encode` for this schema.
        """
        if self.identity:
            check(encoded, self._schema)
            return snapshot(encoded)
        arrays = self._arrays(self._read(encoded))
        lossy = len(arrays) - len(self._exact)
        vector = self._restored(arrays[:lossy])
        _must_be_finite(vector)
        parts = dict(zip(self._trained, torch.split(torch.from_numpy(vector), self._sizes)))
        exact = dict(zip(self._exact, arrays[lossy:]))
        return {
            name: _tensor(exact[name], dtype, shape) if name in exact else _narrowed(parts[name], dtype).reshape(shape)
            for name, (dtype, shape) in self._schema.items()
        }

    def largest(self) -> int:
        """Bytes of the encoded tensors: exact if `fixed_size`, else the most they can take."""
        return nbytes(self.encoded_schema())

    def encoded_schema(self) -> Schema:
        """Names, dtypes and shapes of the encoded tensors; `largest()` as the length if that is not fixed."""
        return self._schema if self.identity else {_ENCODED: (torch.uint8, (self._size,))}

    def _vector(self, params: Params) -> Floats:
        parts = [params[name].detach().reshape(-1).to("cpu", torch.float32) for name in self._trained]
        return torch.cat([torch.zeros(0), *parts]).numpy()

    def _restored(self, arrays: Sequence[Array]) -> Floats:
        """From the arrays of the lossy stages to the vector, which may be infinite."""
        beside, written = arrays[: len(self._beside)], arrays[len(self._beside) :]
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = self._quantiser.restore(written) if self._quantiser else written[0]
            return self._reducer.restore(numbers, beside) if self._reducer else numbers

    def _written(self, arrays: Iterable[Array]) -> bytes:
        """Join the arrays; with a coder only if that makes them shorter, so that the length tells whether it did."""
        if not self._coder:
            return b"".join(array.tobytes() for array in arrays)
        # First bytes, second bytes and so on: those of one kind are alike.
        plain = b"".join(array.view(np.uint8).reshape(len(array), -1).T.tobytes() for array in arrays if len(array))
        coded = self._coder.compress(plain)
        return coded if len(coded) < len(plain) else plain

    def _read(self, encoded: Params) -> bytes:
        tensor = encoded.get(_ENCODED)
        if tensor is None or len(encoded) != 1:
            raise CodecError("the encoded tensors have other names", got=sorted(encoded), expected=_ENCODED)
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CodecError("the encoded tensor is wrong", got=f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.numel() > self._size or (self.fixed_size and tensor.numel() < self._size):
            raise CodecError("the length is wrong", got=tensor.numel(), expected=f"{self._size} bytes")
        content = tensor.cpu().contiguous().numpy().tobytes()
        return self._coder.decompress(content, self._size) if self._coder and len(content) < self._size else content

    def _arrays(self, content: bytes) -> list[Array]:
        arrays: list[Array] = []
        start = 0
        for dtype, length in self._fields:
            octets = np.frombuffer(content, np.uint8, dtype.itemsize * length, start)
            start += len(octets)
            if self._coder:
                octets = octets.reshape(dtype.itemsize, length).T
            arrays.append(octets.flatten().view(dtype))
        return arrays


_NOTHING = torch.zeros(0, dtype=torch.uint8)


def make_chain(specs: Sequence[str], schema: Schema, lossless: Collection[str] = ()) -> Chain:
    """Build the chain of an experiment file, such as ["topk:0.01", "int8", "zstd"].

    Args:
        specs: stages as text.
        schema: of what is encoded.
        lossless: names that no stage but the entropy coder touches.

    Raises:
        ValueError: as `parse_chain`, whom an experiment file has passed already.
    """
    return Chain(parse_chain(specs), schema, lossless)


def _expanded(stages: Sequence[StageSpec]) -> list[StageSpec]:
    """Replace Sattler's sparse ternary compression by what it is made of."""
    result: list[StageSpec] = []
    for stage in stages:
        result += [StageSpec("topk", stage.parameter), StageSpec("sign")] if stage.name == "stc" else [stage]
    return result


def _make_reducer(by_name: Mapping[str, StageSpec], shapes: Sequence[tuple[int, ...]], coded: bool) -> Reducer | None:
    size = sum(math.prod(shape) for shape in shapes)
    for name in ("topk", "randk", "powersgd"):
        if name in by_name:
            parameter = by_name[name].parameter
            assert parameter is not None, "parse saw to it"
            if name == "topk":
                return TopK(parameter, size, coded)
            return RandK(parameter, size) if name == "randk" else PowerSgd(int(parameter), shapes)
    return None


def _make_quantiser(by_name: Mapping[str, StageSpec], pieces: tuple[int, ...], coded: bool) -> Quantiser | None:
    if "fp16" in by_name:
        return Float16(sum(pieces))
    if "bf16" in by_name:
        return BFloat16(sum(pieces))
    if "sign" in by_name:
        return Sign(pieces)
    if "qsgd" in by_name:
        return Uniform(int(by_name["qsgd"].parameter or 0), pieces, None, coded)
    for name, bits in (("int8", 8), ("int4", 4)):
        if name in by_name:
            bucket = by_name[name].parameter
            return Uniform(bits, pieces, None if bucket is None else int(bucket), coded)
    return None


def _make_coder(by_name: Mapping[str, StageSpec]) -> Coder | None:
    if "zstd" in by_name:
        return Zstd(int(by_name["zstd"].parameter or 1))
    return Deflate() if "deflate" in by_name else None


def _must_be_finite(numbers: Floats) -> None:
    if not np.isfinite(numbers).all():
        raise CodecError("the update is not finite", expected="finite numbers where a stage loses some of them")


def _residual(kept: Tensor, size: int) -> Floats:
    if kept.dtype != torch.float32 or kept.shape != (size,):
        got = f"{kept.dtype} {list(kept.shape)}"
        raise CodecError("the kept residual is of another model", got=got, expected=f"{torch.float32} [{size}]")
    return kept.numpy()


def _raw_field(dtype: torch.dtype, shape: tuple[int, ...]) -> Field:
    return Field(np.dtype(f"V{dtype.itemsize}"), math.prod(shape))


def _raw(tensor: Tensor) -> Array:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"V{flat.element_size()}")


def _tensor(array: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(array):
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(array.view(np.uint8)).view(dtype).reshape(shape)


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to a dtype; to its largest number rather than to infinity."""
    most = torch.finfo(dtype).max
    return (values.clamp(-most, most) if most < torch.finfo(torch.float32).max else values).to(dtype, copy=True)
