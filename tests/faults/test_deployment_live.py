"""Clients whose time is real: who is late, who is used, and what a server that was killed takes up again."""

from typing import Any

FEDBUFF = ("strategy.name=fedbuff", "strategy.buffer_size=2", "strategy.max_in_flight=3")


def test_the_first_to_answer_are_used_and_the_late_let_go(deployment: Any) -> None:
    server = deployment.server("clients.per_round=2", "clients.over_selection=1.5")
    deployment.client("client-0")
    slow = deployment.client("client-1", step_1="hold")
    other = deployment.client("client-2", step_7="hold")  # in round 3
    other.reaches("step 7")
    slow.go_on("step 1")
    server.ends(0)
    trained = [point for point in slow.points() if point.startswith(("asked", "step"))]
    assert trained[:3] == ["asked 1", "step 1", "asked 2"]  # it has left off for what is wanted now
    assert "round 1: the update was not used" in slow.said()
    came = [(record["participants"], record["late"]) for record in deployment.rounds()]
    first_two = ["client-0", "client-2"], ["client-1"]
    assert came == [first_two, first_two, (["client-0", "client-1"], ["client-2"])]


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
    server = deployment.server(*FEDBUFF, "rounds=12")
    deployment.clients("client-1")
    slow = deployment.client("client-1", step_1="hold")
    server.says("round  2/12")
    slow.go_on("step 1")
    server.ends(0)
    records = deployment.rounds()
    assert [len(record["participants"]) for record in records] == [2] * 12
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


OWN = """
rounds = 6
task.name = "logistic"
[data]
path = "data.csv"
target = "outcome"
classes = ["no", "yes"]
client_column = "hospital"
partition = { kind = "natural" }
scaling = "client"
[training]
local_steps = 3
[run]
device = "cpu"
checkpoint_seconds = 0
"""


def test_a_client_joins_with_data_of_its_own_and_stays_through_a_kill(deployment: Any) -> None:
    deployment.experiment = OWN
    for number in range(3):
        rows = [f"h{number},{row % 7},{(row * number) % 5},{('no', 'yes')[row % 2]}\n" for row in range(30 + number)]
        (deployment.folder / f"client-{number}.csv").write_text("hospital,age,dose,outcome\n" + "".join(rows))

    def client(number: int, **points: Any) -> Any:
        flags = ("--once", "--data", deployment.folder / f"client-{number}.csv")
        return deployment.client(f"client-{number}", flags=flags, **points)

    flags = ("--own-data", "--min-clients", 2)
    first = deployment.server(flags=flags, took_10="die")
    others = [client(0), client(2, step_4="hold")]
    others[1].reaches("step 4")
    newcomer = client(1)
    newcomer.says("waits for a task")
    others[1].go_on("step 4")
    first.ends(-9)
    assert "clients joined after round 2" in first.said()
    deployment.server(flags=flags).ends(0)
    came = [sorted(record["participants"]) for record in deployment.rounds()]
    assert came == [["client-0", "client-2"]] * 2 + [["client-0", "client-1", "client-2"]] * 4
    for process in (*others, newcomer):
        process.ends(0)
