from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedtrain import flower
from fedtrain.link.frames import pack


def name_of(reply: Message) -> str:
    return str(reply.content.config_records["config"]["name"])


def messages(grid: Any) -> list[Message]:
    return [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]


def test_node_ids_are_positions_in_the_names(net: Any) -> None:
    net.serve()
    names = ["a", "b"]
    grid = net.grid(names)
    assert list(grid.get_node_ids()) == [1, 2]
    names.append("c")
    assert list(grid.get_node_ids()) == [1, 2, 3]


def test_replies_name_their_message_their_node_and_their_run(net: Any) -> None:
    net.serve()
    for name in "abc":
        net.join(name)
    seen = {}
    for reply in net.ask("abc", size=300_000):
        seen[reply.metadata.src_node_id] = name_of(reply)
        assert reply.metadata.message_id == f"reply-{reply.metadata.reply_to_message_id}"
        assert reply.metadata.group_id == "1"
        assert reply.metadata.run_id == 1
        assert torch.equal(flower.tensors(reply.content["arrays"])["w"], torch.arange(300_000.0))
    assert seen == {1: "a", 2: "b", 3: "c"}


def test_what_is_pushed_can_be_pulled_once(net: Any) -> None:
    net.serve()
    net.join("a", lambda task, _: task.submit(pack(task.fetch(0))))
    net.join("b", lambda task, _: task.submit(pack(task.fetch(0))))
    grid = net.grid("ab")
    first, second = grid.push_messages(messages(grid))
    assert [m.metadata.src_node_id for m in grid.pull_messages([second, "unknown"])] == [2]
    assert [m.metadata.src_node_id for m in grid.pull_messages([first, second])] == [1]


def test_messages_of_all_rounds_have_names_of_their_own(net: Any) -> None:
    net.serve()
    grid = net.grid("a", deadline=0)
    assert len({name for _ in range(3) for name in grid.push_messages(messages(grid))}) == 3


def test_a_timeout_goes_before_the_deadline(net: Any) -> None:
    net.serve()
    grid = net.grid("a", deadline=3600)
    assert list(grid.send_and_receive(messages(grid), timeout=0)) == []
