from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedtrain import flower
from fedtrain.link.frames import pack


def name_of(reply: Message) -> str:
    return str(reply.content.config_records["config"]["name"])


def messages(grid: Any) -> list[Message]:
    return [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]


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


def test_750_megabytes_pass_in_both_directions_over_tls(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)
    net.join("a", lambda task, _: task.submit(pack(task.fetch(1 << 30))), credentials=certificates.client("a"))
    size = 750_000_000 // 4
    (reply,) = net.ask("a", size=size, limit=1 << 30)
    assert torch.equal(flower.tensors(reply.content["arrays"])["w"], torch.arange(float(size)))
