from pathlib import Path

import numpy as np
import pytest

from fedtrain.errors import InputError
from fedtrain.experiment.clients import ClientsSection
from fedtrain.server.selection import Crowd, eligible, fixed_sample

SIZES = np.arange(1, 101)


def crowd(**section: object) -> Crowd:
    return Crowd(ClientsSection.model_validate({"per_round": 10, **section}), 7, SIZES)


def rounds(sampling: str, count: int = 400) -> list[list[int]]:
    return [crowd(sampling=sampling).draw(number).tolist() for number in range(count)]


@pytest.mark.parametrize("sampling", ["uniform", "poisson", "by-size", "power-of-choice"])
def test_the_same_round_asks_the_same_clients_in_order(sampling: str) -> None:
    assert rounds(sampling, 5) == rounds(sampling, 5)
    assert rounds(sampling, 5)[0] != rounds(sampling, 5)[1]
    assert all(chosen == sorted(set(chosen)) for chosen in rounds(sampling, 20))


def test_uniform_asks_everybody_equally_often() -> None:
    drawn = np.bincount(np.concatenate(rounds("uniform")), minlength=100)
    assert drawn.sum() == 4000
    # 40 each, standard deviation 6: five of them leave a chance of one in ten thousand over 100 clients.
    assert abs(drawn - 40).max() < 30


def test_poisson_varies_the_cohort_around_its_mean() -> None:
    sizes = np.array([len(chosen) for chosen in rounds("poisson")])
    assert 9.25 < sizes.mean() < 10.75  # five standard errors of 3 / sqrt(400)
    assert 2.2 < sizes.std() < 3.8  # binomial: sqrt(100 * 0.1 * 0.9) = 3


def test_by_size_prefers_large_clients() -> None:
    drawn = np.concatenate(rounds("by-size")) + 1
    assert 61 < drawn.mean() < 70  # (2n + 1) / 3 = 67 for single draws; without replacement a little less


def test_empty_clients_are_never_asked_and_all_means_all() -> None:
    everybody = Crowd(ClientsSection(), 0, np.array([3, 0, 5]))
    assert everybody.draw(1).tolist() == [0, 2]
    assert everybody.draw_one(1, busy={0}) == 2
    assert everybody.draw_one(1, busy={0, 2}) is None


def test_power_of_choice_takes_the_highest_losses_of_its_candidates_and_first_the_unknown() -> None:
    choosing = crowd(sampling="power-of-choice", candidates=100)
    choosing.losses = {client: float(client % 50) for client in range(100) if client != 3}
    known = [choosing.losses[client] for client in choosing.draw(1).tolist() if client != 3]
    assert sorted(known) == [45.0, 46.0, 46.0, 47.0, 47.0, 48.0, 48.0, 49.0, 49.0]
    few = crowd(sampling="power-of-choice", candidates=10)
    few.losses = choosing.losses
    assert few.draw(1).mean() < 90  # ten candidates for ten places: the losses have no say


def test_those_set_aside_are_not_asked_and_others_take_their_places() -> None:
    for sampling in ("uniform", "by-size", "power-of-choice"):
        some = crowd(sampling=sampling)
        some.absent = set(range(50, 100))
        assert all(len(some.draw(number)) == 10 and some.draw(number).max() < 50 for number in range(20))


def test_over_selection_asks_more() -> None:
    assert len(crowd(over_selection=1.3, duration={"seconds": 1.0}).draw(1)) == 13


def test_evaluators_are_drawn_once() -> None:
    assert fixed_sample(5, 1, 100).tolist() == fixed_sample(5, 1, 100).tolist()
    assert len(set(fixed_sample(5, 1, 100).tolist())) == 5
    assert fixed_sample(200, 1, 3).tolist() == [0, 1, 2]
    assert fixed_sample(0, 1, 3).tolist() == []


TAGS = "client,gpu,site\na,true,north\nb,false,north\nc,true, south\n"


def tagged(folder: Path, where: dict[str, object], content: str = TAGS) -> list[bool]:
    (folder / "tags.csv").write_text(content)
    section = ClientsSection.model_validate({"tags": "tags.csv", "where": where})
    return eligible(section, folder, ["a", "b", "c", "unlisted"]).tolist()


def test_clients_are_asked_by_tag(tmp_path: Path) -> None:
    assert tagged(tmp_path, {"gpu": True}) == [True, False, True, False]
    assert tagged(tmp_path, {"gpu": True, "site": "south"}) == [False, False, True, False]
    assert eligible(ClientsSection(), tmp_path, ["a", "b"]).tolist() == [True, True]


@pytest.mark.parametrize(
    ("where", "content", "told"),
    [
        ({"gpus": True}, TAGS, "has no column 'gpus'.*Did you mean gpu"),
        ({"site": "west"}, TAGS, "no client has the tags.*site = west"),
        ({"gpu": True}, "name,gpu\na,true\n", "has no column 'client'"),
        ({"gpu": True}, "", "has no column 'client'"),
        ({"gpu": True}, TAGS + "aa,true,north\n", "names clients that there are not: got aa"),
    ],
)
def test_a_wrong_tag_is_told(tmp_path: Path, where: dict[str, object], content: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        tagged(tmp_path, where, content)


def test_a_missing_file_of_tags_is_told(tmp_path: Path) -> None:
    section = ClientsSection(tags="none.csv", where={"gpu": True})
    with pytest.raises(InputError, match=r"cannot be read .*none\.csv"):
        eligible(section, tmp_path, ["a"])
