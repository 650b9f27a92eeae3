"""What an error shows."""

from pathlib import Path

from fedtrain.errors import InputError, nearest, shorten


def test_a_long_value_is_cut_and_a_path_never() -> None:
    path = Path("/data") / ("hospital" * 20) / "none.csv"
    assert str(InputError("no such file", got=path)) == f"no such file: got {path}"
    assert shorten(str(path)) == str(path)[:79] + "…"


def test_no_control_characters_reach_the_terminal() -> None:
    assert shorten(Path("a\x1b[31mb")) == shorten("a\x1b[31mb") == "a\N{REPLACEMENT CHARACTER}[31mb"


def test_a_hint_names_what_was_meant_or_some_of_what_there_is() -> None:
    features = ["age", "race=White", "sex=Female", "sex=Male"]
    assert nearest("agee", features) == "Did you mean age?"
    assert nearest("sex", features) == "Did you mean sex=Female or sex=Male?"
    assert nearest("weight", features) == "There is: age, race=White, sex=Female, sex=Male"
    assert nearest("weight", features, otherwise="Look again") == "Look again"
    assert nearest("", ["a"]) == nearest(1, ["a"]) == "There is: a"
    assert nearest("x", [f"n{i}" for i in range(105)]).endswith("n18, n19 and 85 more")


def test_a_hint_goes_by_letters_and_not_by_case():
    assert nearest("FEDAVG", ["fedprox", "fedavg"]) == "Did you mean fedavg?"
    assert nearest("AGE", ["Age", "age"]) == "Did you mean Age?"
    assert nearest("Sex", ["sex=Female", "age"]) == "Did you mean sex=Female?"
