"""How updates are compressed on their way: the section `[compression]`, and the stages that its lists name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from fedtrain.errors import nearest
from fedtrain.experiment.base import Section

__all__ = ["CompressionSection", "Kind", "StageSpec", "kind_of", "parse", "parse_chain"]

Kind = Literal["reducer", "quantiser", "coder"]
_ORDER: tuple[Kind, ...] = ("reducer", "quantiser", "coder")


@dataclass(frozen=True)
class StageSpec:
    """One stage of a chain, as `parse` reads it: "topk:0.01" is `StageSpec("topk", 0.01)`."""

    name: str
    parameter: float | None = None  # an int where the stage counts something


@dataclass(frozen=True)
class _Form:
    """How a stage is written.

    Attributes:
        kind: its place in a chain.
        word: what its parameter is; "" if it has none.
        required: whether the parameter must be given.
        least: of an integer parameter; a fraction lies between 0 and 1.
        most: likewise.
        whole: whether a whole model survives it; else it is for changes alone.
    """

    kind: Kind
    word: str = ""
    required: bool = False
    least: int = 1
    most: int = 10**9 - 1
    whole: bool = True

    @property
    def pattern(self) -> str:
        """What may follow the stage's name, as a regular expression."""
        if not self.word:
            return ""
        if self.word == "FRACTION":
            return r":0?\.[0-9]{0,9}[1-9][0-9]{0,9}"
        few = self.most < 100
        numbers = "|".join(map(str, range(self.least, self.most + 1))) if few else "[1-9][0-9]{0,8}"
        return f":({numbers})" if self.required else f"(:({numbers}))?"


_FORMS = {
    "topk": _Form("reducer", "FRACTION", required=True, whole=False),
    "randk": _Form("reducer", "FRACTION", required=True, whole=False),
    "stc": _Form("reducer", "FRACTION", required=True, whole=False),
    "powersgd": _Form("reducer", "RANK", required=True, whole=False),
    "fp16": _Form("quantiser"),
    "bf16": _Form("quantiser"),
    "int8": _Form("quantiser", "BUCKET"),
    "int4": _Form("quantiser", "BUCKET"),
    "qsgd": _Form("quantiser", "BITS", required=True, least=2, most=8),
    "sign": _Form("quantiser", whole=False),
    "zstd": _Form("coder", "LEVEL", most=22),
    "deflate": _Form("coder"),
}


def parse(text: str) -> StageSpec:
    """Read one stage, such as "topk:0.01", "int8" or "zstd:3".

    Raises:
        ValueError: there is no such stage, or its parameter is wrong; the message says what is allowed.
    """
    name, colon, written = text.partition(":")
    if name not in _FORMS:
        raise ValueError(f"a known stage. {nearest(name, _FORMS)}")
    form = _FORMS[name]
    if not form.word and colon:
        raise ValueError(f"{name}, which takes no parameter")
    if not colon and not form.required:
        return StageSpec(name)
    if form.word == "FRACTION":
        if re.fullmatch(form.pattern, colon + written):
            return StageSpec(name, float(written))
        raise ValueError(f"{name}:FRACTION with a decimal fraction greater than 0 and below 1, such as {name}:0.01")
    if re.fullmatch(form.pattern, colon + written):
        return StageSpec(name, int(written))
    raise ValueError(f"{name}:{form.word} with an integer from {form.least} to {form.most}")


def kind_of(stage: StageSpec) -> Kind:
    """Say where in a chain a stage stands."""
    return _FORMS[stage.name].kind


def parse_chain(texts: Sequence[str]) -> list[StageSpec]:
    """Read the stages of a chain, and check their order.

    Raises:
        ValueError: as `parse`, or the stages do not go together.
    """
    stages = [parse(text) for text in texts]
    places = [_ORDER.index(kind_of(stage)) for stage in stages]
    if sorted(set(places)) != places:
        kinds = {kind: ", ".join(name for name, form in _FORMS.items() if form.kind == kind) for kind in _ORDER}
        raise ValueError(
            f"at most one of {kinds['reducer']}; then at most one of {kinds['quantiser']}; "
            f"then at most one of {kinds['coder']}"
        )
    if [stage.name for stage in stages if kind_of(stage) != "coder"][1:] and stages[0].name == "stc":
        raise ValueError("stc without a quantiser: it leaves one bit per number; for another, use topk in its place")
    return stages


def _stage(text: str) -> str:
    parse(text)
    return text


_PATTERN = "^(" + "|".join(f"{name}{form.pattern}" for name, form in _FORMS.items()) + ")$"
_Stages = list[Annotated[str, AfterValidator(_stage), WithJsonSchema({"type": "string", "pattern": _PATTERN})]]
_EXAMPLES = [["int8", "zstd"], ["topk:0.01", "int8", "zstd"]]


class CompressionSection(Section):
    """How updates are compressed on their way."""

    up: _Stages = Field(default=[], examples=_EXAMPLES)
    """Stages that a client's update passes in this order; none for plain float32."""

    down: _Stages = Field(default=[], examples=_EXAMPLES[:1])
    """Stages that the server's parameters pass; none for plain float32."""

    up_of: Literal["delta", "full"] = "delta"
    """What clients send: the change since what they were sent, or the trained parameters themselves."""

    down_of: Literal["full", "change"] = "full"
    """What the server sends: the parameters, or their change since the initial model, which clients build from the
    seed."""

    error_feedback: bool = True
    """Whether clients keep what a biased chain lost, and add it to their next update."""

    max_bytes: int | None = Field(default=None, ge=1, examples=[1_000_000_000])
    """Bytes up and down, of all clients and rounds, after which the run ends; leave out for no limit. Not part of
    the run's identity: an interrupted run may be resumed with another limit; one that the limit ended is complete."""

    @field_validator("up", "down")
    @classmethod
    def _ordered(cls, texts: list[str]) -> list[str]:
        parse_chain(texts)
        return texts

    @model_validator(mode="after")
    def _changes_are_sparse(self) -> CompressionSection:
        partial = [text for text in self.up if not _FORMS[parse(text).name].whole]
        if partial and self.up_of == "full":
            raise ValueError(
                f'up with {partial[0]} needs up_of = "delta": it keeps the large or coarse part of a change, '
                "and little of a whole model would be left"
            )
        partial = [text for text in self.down if not _FORMS[parse(text).name].whole]
        if partial:
            raise ValueError(
                f"down with {partial[0]}: it keeps a part, and the server, which starts anew in each round, would "
                "never send the rest; take a quantiser or a coder"
            )
        if self.down_of == "change" and not self.down:
            raise ValueError('down_of = "change" without stages in down says nothing: give some')
        return self
