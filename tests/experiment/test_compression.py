import pytest
from pydantic import ValidationError

from fedtrain.experiment.compression import CompressionSection, StageSpec, parse, parse_chain


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("fp16", StageSpec("fp16")),
        ("int8", StageSpec("int8")),
        ("int8:512", StageSpec("int8", 512)),
        ("qsgd:6", StageSpec("qsgd", 6)),
        ("topk:0.01", StageSpec("topk", 0.01)),
        ("randk:.5", StageSpec("randk", 0.5)),
        ("powersgd:4", StageSpec("powersgd", 4)),
        ("zstd:3", StageSpec("zstd", 3)),
    ],
)
def test_a_stage_is_a_name_and_a_parameter(text: str, stage: StageSpec) -> None:
    assert parse(text) == stage


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("topq:0.1", r"Did you mean topk\?"),
        ("gzip", "There is: topk, randk"),
        ("", "There is: topk, randk"),
        ("INT8", "a known stage"),
        ("topk", "topk:FRACTION"),
        ("topk:0", "topk:FRACTION"),
        ("topk:0.0", "greater than 0"),
        ("topk:1", "below 1"),
        ("topk:1e-2", "decimal fraction"),
        ("topk:-0.1", "topk:FRACTION"),
        ("stc:nan", "stc:FRACTION"),
        ("powersgd", "powersgd:RANK with an integer from 1"),
        ("powersgd:0", "powersgd:RANK with an integer from 1"),
        ("powersgd:2.5", "an integer"),
        ("qsgd:9", "an integer from 2 to 8"),
        ("int8:", "int8:BUCKET with an integer from 1"),
        ("int4:99999999999", "int4:BUCKET"),
        ("zstd:23", "zstd:LEVEL with an integer from 1 to 22"),
        ("fp16:2", "fp16, which takes no parameter"),
        ("sign:", "sign, which takes no parameter"),
    ],
)
def test_a_stage_that_is_none_is_refused_with_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text)


@pytest.mark.parametrize(
    "texts", [["int8", "topk:0.1"], ["zstd", "int8"], ["int8", "int4"], ["topk:0.1", "powersgd:2"], ["zstd", "deflate"]]
)
def test_stages_out_of_order_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="at most one of topk, randk, stc, powersgd; then at most one of fp16"):
        parse_chain(texts)


def test_stc_takes_no_quantiser() -> None:
    with pytest.raises(ValueError, match="stc without a quantiser"):
        parse_chain(["stc:0.1", "int8"])
    assert [stage.name for stage in parse_chain(["stc:0.1", "zstd"])] == ["stc", "zstd"]


@pytest.mark.parametrize("stage", ["topk:0.1", "randk:0.1", "stc:0.1", "powersgd:2", "sign"])
def test_a_whole_model_does_not_pass_stages_made_for_changes(stage: str) -> None:
    with pytest.raises(ValidationError, match="would never send the rest"):
        CompressionSection(down=[stage], down_of="change")
    with pytest.raises(ValidationError, match='needs up_of = "delta"'):
        CompressionSection(up=[stage], up_of="full")
    with pytest.raises(ValidationError, match="without stages in down"):
        CompressionSection(up=[stage], down_of="change")
    assert CompressionSection(up=["int8", "zstd"], up_of="full", down=["bf16", "deflate"])


def test_every_fault_is_told_by_itself() -> None:
    with pytest.raises(ValidationError) as caught:
        CompressionSection.model_validate({"up": ["tpk:0.1", "int9", "zstd"], "down": ["zstd", "int8"], "max_bytes": 0})
    assert [error["loc"] for error in caught.value.errors()] == [("up", 0), ("up", 1), ("down",), ("max_bytes",)]


def test_without_options_nothing_is_compressed() -> None:
    section = CompressionSection()
    assert (section.up, section.down, section.up_of, section.down_of) == ([], [], "delta", "full")
    assert section.error_feedback
    assert section.max_bytes is None
