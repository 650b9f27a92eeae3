import logging
import time
from typing import Any

import pytest

from fedtrain.cli.log import logged

LOG = logging.getLogger("fedtrain.link")


class Listener:
    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def test_a_flood_of_one_kind_is_thinned_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    listener: Any = Listener()
    with logged(listener):
        for number in range(1000):
            LOG.warning("%s is refused", f"peer-{number}")
        LOG.warning("another thing")
        now += 61
        LOG.warning("%s is refused", "the next")
        LOG.warning("%s is refused", "the last")
    assert listener.notices[:19] == [f"peer-{number} is refused" for number in range(19)]
    assert listener.notices[19:] == [
        "peer-19 is refused (more such lines are left out for a minute)",
        "another thing",
        "the next is refused (980 more such lines were left out)",
        "the last is refused",
    ]
