"""Clients that are asked at any time, and answer from call to call."""

import threading
from typing import Any

from flwr.app import Message, RecordDict

from fedtrain import flower
from fedtrain.link.channel import Link, Task
from fedtrain.link.frames import pack


def asked(grid: Any, *nodes: int) -> Any:
    return grid.send_and_receive([grid.create_message(RecordDict(), "train", node, "1") for node in nodes])


def nodes(replies: Any) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def answer(task: Task, _link: Link) -> None:
    task.submit(pack(task.fetch(0)))


def test_what_was_asked_earlier_is_answered_later(net: Any) -> None:
    net.serve()
    go = threading.Event()

    def slowly(task: Task, link: Link) -> None:
        assert go.wait(30)
        answer(task, link)

    net.join("a", slowly)
    net.join("b", answer)
    for name in "ab":
        net.doorman.wait_for(("ready", name))
    grid = net.grid("ab", flowing=True)
    for _ in range(2):  # a goes on with the first
        assert next(asked(grid, 1, 2) if _ == 0 else asked(grid, 2)).metadata.src_node_id == 2
    go.set()
    assert nodes(asked(grid)) == [1]


def test_each_has_a_patience_of_its_own(net: Any) -> None:
    net.serve()
    idle = net.join("a", lambda task, _: task.cancelled.wait(30))
    net.join("b", answer)
    for name in "ab":
        net.doorman.wait_for(("ready", name))
    grid = net.grid("ab", flowing=True, patience=3)
    replies: list[Message] = list(asked(grid, 1, 2))
    assert nodes(replies) == [2, 1]
    assert replies[1].error.code == flower.CLIENT_AWAY
    assert replies[1].error.reason == "no progress for 3 seconds"
    assert idle.handled.acquire(timeout=30), "it was told that its answer is not wanted"


def test_who_is_gone_is_missed_at_once_until_it_is_back(net: Any) -> None:
    net.serve()
    grid = net.grid("ab", flowing=True, patience=2)
    assert [reply.error.reason for reply in asked(grid, 1)] == ["no progress for 2 seconds"]
    assert [reply.error.reason for reply in asked(grid, 1)] == ["it is not there"]
    net.join("a", answer)
    net.doorman.wait_for(("ready", "a"))
    assert [reply.has_content() for reply in asked(grid, 1)] == [True]
