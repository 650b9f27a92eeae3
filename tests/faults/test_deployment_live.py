"""Clients whose time is real: who is late, who is used, and what a server that was killed takes up again."""

from typing import Any

FEDBUFF = ("strategy.name=fedbuff", "strategy.buffer_size=2", "strategy.max_in_flight=3")


def test_the_first_to_answer_are_used_and_the_late_let_go(deployment: Any) -> None:
    first_two = ("clients.per_round=2", "clients.over_selection=1.5")
    server = deployment.server(*first_two)
    deployment.clients("client-1")
    slow = deployment.client("client-1", step_1="hold")
    server.says("round 1/3")
    slow.go_on("step 1")
    server.ends(0)
    first = deployment.rounds()[0]
    assert (first["participants"], first["late"]) == (["client-0", "client-2"], ["client-1"])
    assert all(len(record["participants"]) == 2 for record in deployment.rounds())
    assert "round 1: the update was not used" in slow.said()
    assert "step 2" not in slow.points() or slow.points().index("step 2") > slow.points().index("asked 2")


def test_a_deadline_ends_a_round_without_the_slow(deployment: Any) -> None:
    server = deployment.server("clients.deadline=3", "clients.quorum=0.3")
    deployment.clients("client-1")
    slow = deployment.client("client-1", step_1="hold")
    server.says("round 1/3")
    slow.go_on("step 1")
    server.ends(0)
    first, *others = deployment.rounds()
    assert first["late"] == ["client-1"]
    assert first["seconds_train"] >= 3
    assert "client-1" in others[-1]["participants"]


def test_a_buffer_fills_without_the_slow_whose_update_comes_later(deployment: Any) -> None:
    server = deployment.server(*FEDBUFF, "rounds=6")
    deployment.clients("client-1")
    slow = deployment.client("client-1", step_1="hold")
    server.says("round 2/6")
    slow.go_on("step 1")
    server.ends(0)
    records = deployment.rounds()
    assert [len(record["participants"]) for record in records] == [2] * 6
    assert not any("client-1" in record["participants"] for record in records[:2])
    assert any("client-1" in record["participants"] for record in records[2:])
    assert any(record["staleness"] > 0 for record in records[2:])
    assert not any(record["quarantined"] or record["late"] for record in records)


def test_a_killed_server_takes_up_its_buffer_again(deployment: Any) -> None:
    first = deployment.server(*FEDBUFF, "rounds=6", took_5="die")
    deployment.clients()
    first.ends(-9)
    again = deployment.server(*FEDBUFF, "rounds=6")
    again.ends(0)
    assert [record["round_number"] for record in deployment.rounds()] == list(range(1, 7))
    assert [len(record["participants"]) for record in deployment.rounds()] == [2] * 6
