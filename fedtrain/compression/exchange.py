"""How parameters and updates are compressed on their way, at both ends of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedtrain.compression.chain import make_chain
from fedtrain.compression.schema import schema_of
from fedtrain.experiment.compression import CompressionSection
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, add, difference, exchanged, is_private, snapshot
from fedtrain.seeds import generator

__all__ = ["Exchange", "Parcel", "make_exchange"]


def make_exchange(experiment: Experiment, model: nn.Module) -> Exchange:
    """Build either end's exchange.

    Args:
        experiment: says how to compress, and what stays with the clients.
        model: with its initial parameters.
    """
    private = experiment.personalization.private
    travelling = {name: t for name, t in exchanged(model).items() if not is_private(name, private)}
    buffers = dict(model.named_buffers()).keys()
    return Exchange(experiment.compression, travelling, buffers, experiment.seed)


_ALIGNMENT = 64  # bytes


class Parcel(NamedTuple):
    """The global parameters on their way to the clients."""

    encoded: Params
    received: Params  # what clients make of it: the model that their updates start from


class Exchange:
    """Encodes and decodes what the server and the clients of a run send each other.

    What is drawn depends on (seed, round, client) alone, so that whoever has to encode again sends the same bytes.

    Args:
        section: the stages of either direction.
        initial: the parameters before the first round, as server and clients build them from the seed.
        buffers: names of those that are not trained, which lossy stages leave alone.
        seed: the experiment's seed.

    Attributes:
        up, down: the chains.
        buffers: as given.
    """

    def __init__(self, section: CompressionSection, initial: Params, buffers: Collection[str], seed: int) -> None:
        schema = schema_of(initial)
        self.buffers = frozenset(buffers)
        self._section, self._seed = section, seed
        self._initial = snapshot(initial) if section.down_of == "change" and section.down else None
        self.up = make_chain(section.up, schema, buffers)
        self.down = make_chain(section.down, schema, buffers)
        self._last: tuple[tuple[Params, str, int], Parcel] | None = None

    def largest(self) -> int:
        """Most bytes of encoded tensors in either direction, with room for their alignment."""
        return max(self.up.largest(), self.down.largest()) + _ALIGNMENT * (len(self.up.encoded_schema()) + 1)

    def send(self, params: Params, kind: str, round_number: int) -> Parcel:
        """Encode the parameters of a round; what was encoded last is not encoded again.

        Args:
            params: the global parameters.
            kind: what for, "train" or "evaluate".
            round_number: names the random stream, with `kind`.
        """
        if self.down.identity:
            return Parcel(params, params)
        if self._last is None or self._last[0][0] is not params or self._last[0][1:] != (kind, round_number):
            content = difference(params, self._initial) if self._initial else params
            rng = generator(self._seed, "compress-down", kind, round_number)
            encoded, _ = self.down.encode(content, {}, rng, feedback=False)
            self._last = (params, kind, round_number), Parcel(encoded, self.receive(encoded))
        return self._last[1]

    def receive(self, encoded: Params) -> Params:
        """Decode the parameters at a client.

        Raises:
            CodecError: they are damaged, or of another chain.
        """
        if self.down.identity:
            return encoded
        decoded = self.down.decode(encoded)
        return add(self._initial, decoded) if self._initial else decoded

    def update(
        self, delta: Params, received: Params, kept: Mapping[str, Any], names: tuple[int, str]
    ) -> tuple[Params, Mapping[str, Any]]:
        """Encode a client's update.

        Args:
            delta: trained minus received parameters.
            received: what the client started from.
            kept: what this returned beside it in the client's last round; empty in the first.
            names: round and client, of the random stream.

        Returns:
            What travels, and what the client keeps.

        Raises:
            CodecError: the update cannot be encoded.
        """
        content = add(received, delta) if self._section.up_of == "full" else delta
        if self.up.identity:
            return content, {}
        rng = generator(self._seed, "compress-up", *names)
        return self.up.encode(content, kept, rng, feedback=self._section.error_feedback)

    def delta(self, encoded: Params, received: Params) -> dict[str, Tensor]:
        """Decode a client's update at the server.

        Args:
            encoded: what came.
            received: what the client started from.

        Raises:
            CodecError: it is damaged, or of another chain.
        """
        if self._section.up_of == "full":
            return difference(self.up.decode(encoded), received)
        return dict(encoded) if self.up.identity else self.up.decode(encoded)
