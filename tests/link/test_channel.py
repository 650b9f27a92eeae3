import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from flwr.app import Message, RecordDict

from fedtrain.errors import ConnectionLostError, InputError, LinkError
from fedtrain.link import channel
from fedtrain.link.channel import Link, Partial, Task, connect
from fedtrain.link.control import Hello
from fedtrain.link.frames import Receiver, pack, unpack

LIMIT = 1 << 26


def hello(name: str = "a") -> Hello:
    return Hello(version="1", name=name, instance="1")


def asked(net: Any, **more: Any) -> tuple[threading.Thread, list[Message]]:
    """Ask client "a" in a thread."""
    got: list[Message] = []
    replies = net.ask("a", **more)
    thread = threading.Thread(target=lambda: got.extend(replies))
    thread.start()
    return thread, got


def test_the_offer_is_what_the_server_offers(net: Any) -> None:
    net.serve()
    with connect(net.hub.address, None, hello()) as link:
        assert (link.offer.run, link.offer.experiment_hash, link.offer.facts) == ("0" * 32, "ab", {"rounds": 3})


def test_no_server_is_an_error_at_once(net: Any) -> None:
    address = net.serve().address
    net.hub.close()
    for _ in range(3):  # no backoff of an older channel
        with pytest.raises(ConnectionLostError, match="unavailable"), connect(address, None, hello()):
            pass


@pytest.mark.parametrize("address", ["localhost", "unix:/tmp/x", "a:b:c", ":1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="address"), connect(address, None, hello()):
        pass


def test_a_server_that_says_nothing_is_given_up(net: Any) -> None:
    net.serve()
    proxy = net.proxy()
    proxy.stalled.set()
    with pytest.raises(ConnectionLostError), connect(proxy.address, None, hello(), heartbeat=0.1):
        pass


def test_a_half_open_connection_is_noticed_at_both_ends(net: Any) -> None:
    net.serve(heartbeat=0.5)
    proxy = net.proxy()
    site = net.join("a", address=proxy.address, heartbeat=0.5)
    net.doorman.wait_for(("ready", "a"))
    proxy.stalled.set()
    site.join()
    assert isinstance(site.error, ConnectionLostError)
    net.doorman.wait_for(("left", "a"))


def test_a_fetch_goes_on_where_it_broke(net: Any) -> None:
    net.serve()
    asking, got = asked(net, size=2_000_000)
    proxy = net.proxy()
    proxy.cut_down_after = 5_000_000
    partial = Partial()

    def fetch() -> None:
        with connect(proxy.address, None, hello(), partial) as link:
            link.ready({})
            next(link.tasks()).fetch(LIMIT)

    with pytest.raises(ConnectionLostError):
        fetch()
    assert partial.receiver is not None
    before = partial.receiver.received
    assert 0 < before < 8_000_000
    down = net.hub.members()[0].bytes_down
    with connect(net.hub.address, None, hello(), partial) as link:
        link.ready({})
        task = next(link.tasks())
        task.submit(pack(task.fetch(LIMIT)))
    asking.join()
    assert torch.equal(got[0].content["arrays"]["w"].tensor, torch.arange(2_000_000.0))
    assert net.hub.members()[0].bytes_down - down == 8_000_000 - before
    assert partial.receiver is None


def test_what_is_left_of_a_fetch_is_let_go_before_there_is_room_for_another(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.serve()
    asking, _ = asked(net)
    partial = Partial("another", unpack(SimpleNamespace(header={"records": {}}, nbytes=0, checksum=""), LIMIT))
    before = weakref.ref(partial.receiver)
    held = []

    def room(claim: Any, limit: int) -> Receiver:
        held.append(before() is not None)
        return unpack(claim, limit)

    monkeypatch.setattr(channel, "unpack", room)
    with connect(net.hub.address, None, hello(), partial) as link:
        link.ready({})
        task = next(link.tasks())
        task.submit(pack(task.fetch(LIMIT)))
    asking.join()
    assert held == [False]


def test_a_channel_that_was_closed_meanwhile_is_a_lost_connection(net: Any) -> None:
    net.serve()
    asking, _ = asked(net, deadline=30)
    with connect(net.hub.address, None, hello()) as link:
        link.ready({})
        task = next(link.tasks())
        packed = pack(task.fetch(LIMIT))
        link._channel.close()
        for call in (lambda: task.fetch(LIMIT), lambda: task.submit(packed)):
            with pytest.raises(ConnectionLostError, match="closed"):
                call()
    net.join("a")
    asking.join()


def test_a_client_that_leaves_does_what_it_was_told_before(net: Any) -> None:
    net.serve()
    asking, got = asked(net)
    with connect(net.hub.address, None, hello()) as link:
        link.ready({})
        tasks = link.tasks()
        task = next(tasks)
        link.leave()
        task.submit(pack(task.fetch(LIMIT)))
        with pytest.raises(ConnectionLostError, match="leaves"):
            next(tasks)
    asking.join()
    assert len(got) == 1


def test_a_port_of_something_else_is_named() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with pytest.raises(ConnectionLostError, match="a port of something else"), connect(address, None, hello()):
        pass
    tls = grpc.ssl_channel_credentials()
    with pytest.raises(ConnectionLostError, match="no TLS at this port"), connect(address, tls, hello()):
        pass
    server.stop(None).wait()


def test_a_cut_in_mid_submit_is_an_error_and_the_answer_can_come_again(net: Any) -> None:
    net.serve()
    asking, got = asked(net, size=2_000_000)
    proxy = net.proxy()
    kept = []

    def submit() -> None:
        with connect(proxy.address, None, hello()) as link:
            link.ready({})
            task = next(link.tasks())
            kept.append(pack(task.fetch(LIMIT)))
            proxy.cut_up_after = 3_000_000
            task.submit(kept[0])

    with pytest.raises(ConnectionLostError):
        submit()
    assert not got
    with connect(net.hub.address, None, hello()) as link:
        link.ready({})
        assert next(link.tasks()).submit(kept[0]).verdict == "accepted"
    asking.join()
    assert len(got) == 1


def test_a_break_is_told_to_whoever_asks_again(net: Any) -> None:
    net.serve()
    with connect(net.hub.address, None, hello()) as link:
        link.ready({})
        with net.hub._roster.lock:
            net.hub._roster.present("a").cut()
        for _ in range(2):
            with pytest.raises(ConnectionLostError):
                next(link.tasks())


def test_a_cancelled_task_is_not_started(net: Any) -> None:
    net.serve()
    started = threading.Event()
    go = threading.Event()

    def handle(task: Task, link: Link) -> None:
        started.set()
        assert go.wait(30)
        task.submit(pack(task.fetch(LIMIT)))

    site = net.join("a", handle)
    asking, got = asked(net)
    assert started.wait(30)
    assert list(net.ask("a", deadline=2)) == []
    go.set()
    asking.join()
    assert len(list(net.ask("a"))) == 1
    assert len(site.tasks) == 2
    assert len(got) == 1


def test_a_task_that_is_gone_cannot_be_fetched(net: Any) -> None:
    net.serve()
    errors: list[str] = []

    def late(task: Task, link: Link) -> None:
        assert task.cancelled.wait(30)
        try:
            task.fetch(LIMIT)
        except Exception as error:
            errors.append(str(error))

    site = net.join("a", late)
    net.doorman.wait_for(("ready", "a"))
    assert list(net.ask("a", deadline=0.2)) == []
    assert site.handled.acquire(timeout=30)
    assert "no such task any more" in errors[0]


def test_a_task_beyond_the_clients_limit_is_refused(net: Any) -> None:
    net.serve()
    asking, _ = asked(net, deadline=30)
    with connect(net.hub.address, None, hello()) as link:
        link.ready({})
        task = next(link.tasks())
        assert (task.kind, task.group, task.nbytes) == ("train", "1", 4032)
        with pytest.raises(Exception, match="too large"):
            task.fetch(4031)
        task.submit(pack(task.fetch(4032)))
    asking.join()


def test_an_open_link_does_not_keep_a_process_alive(net: Any) -> None:
    net.serve()
    code = (
        "from fedtrain.link.channel import connect\n"
        "from fedtrain.link.control import Hello\n"
        f"session = connect('{net.hub.address}', None, Hello(version='1', name='a', instance='1'))\n"
        "session.__enter__().ready({})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    net.doorman.wait_for(("ready", "a"), ("left", "a"))


def test_a_server_that_asks_without_end_is_left(net: Any) -> None:
    net.serve()
    over = threading.Event()
    site = net.join("a", lambda task, _: over.wait(30))
    net.doorman.wait_for(("ready", "a"))
    grid = net.grid("a", deadline=1.0)
    many = [grid.create_message(RecordDict(), "train", 1, "1") for _ in range(150)]
    assert list(grid.send_and_receive(many)) == []
    over.set()
    site.join()
    assert isinstance(site.error, LinkError)
    assert "asks for more than it waits for" in str(site.error)
