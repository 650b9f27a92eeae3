import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.app import Error, Message, RecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedtrain import flower
from fedtrain.errors import ConnectionLostError, InputError, LinkError, RefusedError, RunError
from fedtrain.link.channel import Link, Task, connect
from fedtrain.link.control import Hello, Offer, SubmitHead, Wanted, encode
from fedtrain.link.frames import Packed, pack
from fedtrain.link.hub import Hub
from fedtrain.link.transport import SERVICE

LIMIT = 1 << 26


def hello(name: str, instance: str = "1", **more: Any) -> Hello:
    return Hello(version="1", name=name, instance=instance, **more)


def knock(*arguments: Any) -> None:
    """Say hello and go."""
    with connect(*arguments):
        pass


def echoed(task: Task) -> Packed:
    return pack(task.fetch(LIMIT))


def damaged(packed: Packed) -> Packed:
    """The same message with another checksum."""
    packed.payload.__dict__["checksum"] = "0" * 32
    return packed


def names(replies: list[Message]) -> list[int]:
    return sorted(reply.metadata.src_node_id for reply in replies if reply.has_content())


def head_of(task: Task, link: Link, packed: Packed, nbytes: int | None = None) -> SubmitHead:
    """The head of an answer, perhaps with another length."""
    size = packed.nbytes if nbytes is None else nbytes
    return SubmitHead(session=link._session, task=task.id, header=packed.header, nbytes=size, checksum=packed.checksum)


def raw_submit(address: str, head: SubmitHead, *chunks: bytes) -> Any:
    """Submit by hand, as a client that is not ours may."""
    with grpc.insecure_channel(address) as channel:
        return channel.stream_unary(f"/{SERVICE}/Submit")(iter([encode(head), *chunks]))


def test_rounds_over_mutual_tls(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)
    sites = [net.join(name, credentials=certificates.client(name)) for name in "ab"]
    for size in (10, 600_000, 0):
        replies = list(net.ask("ab", size=size))
        assert names(replies) == [1, 2]
        assert all(torch.equal(r.content["arrays"]["w"].tensor, torch.arange(float(size))) for r in replies)
    net.hub.close("done", back=True)
    for site in sites:
        site.join()
        assert (site.farewell.reason, site.farewell.back) == ("done", True)
    net.doorman.wait_for(("ready", "a"), ("left", "a"), ("ready", "b"), ("left", "b"))


def test_fifty_clients(net: Any) -> None:
    net.serve(max_clients=50)
    everybody = [f"site-{n}" for n in range(50)]
    for name in everybody:
        net.join(name)
    for _ in range(3):
        assert len(names(list(net.ask(everybody, size=5000)))) == 50
    members = net.hub.members()
    assert [member.name for member in members] == sorted(everybody)
    assert {member.bytes_down for member in members} == {3 * 20_032}
    with pytest.raises(RefusedError, match="50 clients already"):
        knock(net.hub.address, None, hello("more"))


def test_messages_that_share_their_arrays_are_summed_once(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net.serve()
    grid = net.grid("abc", deadline=0)
    shared = flower.array_record({"w": torch.zeros(1000)})
    counted = []
    monkeypatch.setattr("fedtrain.link.frames.Sum.update", lambda _, data: counted.append(len(data)))
    list(grid.send_and_receive(grid.create_message(RecordDict({"a": shared}), "train", n, "1") for n in (1, 2, 3)))
    assert sum(counted) == 4032


def test_a_client_that_comes_later_or_comes_back_is_asked(net: Any) -> None:
    net.serve()
    replies = net.ask("a")
    got: list[Message] = []
    asking = threading.Thread(target=lambda: got.extend(replies))
    asking.start()
    with connect(net.hub.address, None, hello("a")) as link:
        link.ready({})
        first = next(link.tasks()).id
    back = net.join("a", instance="1")
    asking.join()
    assert names(got) == [1]
    assert back.tasks == [first]


def test_the_first_answer_counts(net: Any) -> None:
    net.serve()

    def twice(task: Task, link: Link) -> Any:
        packed = echoed(task)
        assert task.submit(packed).verdict == "accepted"
        return task.submit(packed)

    site = net.join("a", twice)
    assert names(list(net.ask("a"))) == [1]
    assert names(list(net.ask("a"))) == [1]
    assert site.handled.acquire(timeout=30)
    assert site.handled.acquire(timeout=30)
    assert [ack.verdict for ack in site.acks] == ["already", "already"]


def test_an_answer_that_is_too_late_is_said_to_be(net: Any) -> None:
    net.serve()

    def wait(task: Task, link: Link) -> Any:
        packed = echoed(task)
        assert task.cancelled.wait(30)
        return task.submit(packed)

    site = net.join("a", wait)
    net.doorman.wait_for(("ready", "a"))
    assert list(net.ask("a", deadline=2)) == []
    assert site.handled.acquire(timeout=30)
    assert [ack.verdict for ack in site.acks] == ["late"]


def test_who_stops_reading_replies_withdraws_the_rest(net: Any) -> None:
    net.serve()
    net.join("a")
    slow = net.join("b", lambda task, _: task.cancelled.wait(30))
    replies = net.ask("ab")
    assert next(replies).metadata.src_node_id == 1
    replies.close()
    assert slow.handled.acquire(timeout=30)
    assert len(slow.tasks) == 1


def test_patience_lasts_while_there_is_progress(net: Any) -> None:
    net.serve(heartbeat=0.5)

    def work(task: Task, link: Link) -> None:
        packed = echoed(task)
        for step in range(1, 31):
            link.status(f"step {step}", step)
            time.sleep(0.15)
        task.submit(packed)

    net.join("a", work, heartbeat=0.5)
    assert names(list(net.ask("a", patience=3))) == [1]


def test_bytes_are_progress(net: Any) -> None:
    net.serve()

    def slowly(task: Task, link: Link) -> None:
        packed = echoed(task)

        def parts() -> Iterator[bytes]:
            yield encode(head_of(task, link, packed))
            for chunk in packed.payload.chunks():
                time.sleep(0.1)
                yield chunk

        with grpc.insecure_channel(net.hub.address) as channel:
            channel.stream_unary(f"/{SERVICE}/Submit")(parts())

    net.join("a", slowly)
    assert names(list(net.ask("a", size=2_000_000, patience=1.5))) == [1]


def test_a_client_has_one_fetch_at_a_time(net: Any) -> None:
    net.serve()
    ends = []

    def twice(task: Task, link: Link) -> None:
        wanted = encode(Wanted(session=link._session, task=task.id, offset=0))
        with grpc.insecure_channel(net.hub.address) as channel:
            first = channel.unary_stream(f"/{SERVICE}/Fetch")(wanted)
            next(first)
            task.submit(echoed(task))
            with pytest.raises(grpc.RpcError) as ended:
                list(first)
            ends.append(ended.value.code())

    site = net.join("a", twice)
    assert names(list(net.ask("a", size=5_000_000))) == [1]
    assert site.handled.acquire(timeout=30)
    assert ends == [grpc.StatusCode.CANCELLED]


def test_presence_is_no_progress(net: Any) -> None:
    net.serve(heartbeat=0.5)

    def idle(task: Task, link: Link) -> None:
        link.status("busy", 1)
        assert task.cancelled.wait(30)

    net.join("a", idle, heartbeat=0.5)
    net.doorman.wait_for(("ready", "a"))
    assert list(net.ask("a", patience=2)) == []


def test_nobody_answers_for_another(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    net.serve()
    acks: dict[str, Any] = {}
    theirs: list[Any] = []
    seen, tried = threading.Event(), threading.Event()

    def honest(task: Task, link: Link) -> None:
        theirs.append(task.notice)
        seen.set()
        assert tried.wait(30)
        task.submit(echoed(task))

    def thief(task: Task, link: Link) -> None:
        assert seen.wait(30)
        packed = echoed(task)
        acks["other"] = link.submit(theirs[0], packed)
        acks["unknown"] = link.submit(theirs[0].model_copy(update={"id": "0-1"}), packed)
        for number in ("0" * 32, "-"):
            head = SubmitHead(session=number, task=task.id, header=packed.header, nbytes=0, checksum="0")
            with pytest.raises(grpc.RpcError) as refused:
                raw_submit(net.hub.address, head)
            acks[number] = refused.value.code()
        with pytest.raises(LinkError, match="asked of a"):
            link.fetch(theirs[0], LIMIT)
        tried.set()
        task.submit(packed)

    net.join("a", honest)
    net.join("b", thief)
    assert names(list(net.ask("ab"))) == [1, 2]
    assert acks["other"].verdict == acks["unknown"].verdict == "refused"
    assert acks["0" * 32] == acks["-"] == grpc.StatusCode.PERMISSION_DENIED
    assert "asked of a" in caplog.text
    assert "its session does not take part" in caplog.text


def test_damage_is_refused_and_leaves_the_task_open(net: Any) -> None:
    net.serve()

    def twice(task: Task, link: Link) -> Any:
        first = task.submit(damaged(echoed(task)))
        assert task.submit(echoed(task)).verdict == "accepted"
        return first

    site = net.join("a", twice)
    assert names(list(net.ask("a", size=600_000))) == [1]
    assert site.handled.acquire(timeout=30)
    assert "checksum" in site.acks[0].reason


def test_who_sends_only_damage_has_failed(net: Any) -> None:
    net.serve()

    def damage(task: Task, link: Link) -> Any:
        packed = damaged(echoed(task))
        return [task.submit(packed) for _ in range(4)][-1]

    site = net.join("a", damage)
    (reply,) = net.ask("a")
    assert "answers were refused" in reply.error.reason
    assert site.handled.acquire(timeout=30)
    assert site.acks[0].verdict == "already"


def test_lying_answers_are_refused(net: Any) -> None:
    net.serve()
    reasons = []

    def lie(task: Task, link: Link) -> None:
        packed = echoed(task)
        data = b"".join(packed.payload.chunks())
        for nbytes, chunks in ((1 << 60, [data]), (len(data) + 64, [data]), (len(data), [data[:-1]])):
            head = head_of(task, link, packed, nbytes)
            reasons.append(raw_submit(net.hub.address, head, *chunks).decode())

    site = net.join("a", lie)
    (reply,) = net.ask("a")
    assert "cut off" in reply.error.reason
    assert site.handled.acquire(timeout=30)
    for expected, reason in zip(("too large", "length", "cut off"), reasons, strict=True):
        assert expected in reason


def test_an_answer_beyond_the_limit_is_refused(net: Any) -> None:
    net.serve()

    def large(task: Task, link: Link) -> Any:
        ack = task.submit(echoed(task))
        task.submit(pack(Error(0, "too large")))
        return ack

    site = net.join("a", large)
    (reply,) = net.ask("a", limit=1000)
    assert reply.error.reason == "too large"
    assert site.handled.acquire(timeout=30)
    assert "too large" in site.acks[0].reason


def test_an_answer_that_breaks_off_leaves_the_task_open(net: Any) -> None:
    net.serve()

    def broken(task: Task, link: Link) -> None:
        packed = echoed(task)

        def half() -> Iterator[bytes]:
            yield encode(head_of(task, link, packed))
            yield next(packed.payload.chunks())
            begun.set()
            assert gone.wait(30)

        with grpc.insecure_channel(net.hub.address) as channel:
            call = channel.stream_unary(f"/{SERVICE}/Submit").future(half())
            assert begun.wait(30)
            call.cancel()
        gone.set()
        task.submit(packed)

    begun, gone = threading.Event(), threading.Event()
    net.join("a", broken)
    assert names(list(net.ask("a", size=600_000))) == [1]


def test_a_line_that_breaks_again_and_again_is_no_offence(net: Any) -> None:
    net.serve()

    def unlucky(task: Task, link: Link) -> None:
        packed = echoed(task)
        for _ in range(40):
            proxy = net.proxy()
            proxy.cut_up_after = 300_000
            with pytest.raises(grpc.RpcError):
                raw_submit(proxy.address, head_of(task, link, packed), *packed.payload.chunks())
        task.submit(packed)

    net.join("a", unlucky)
    assert names(list(net.ask("a", size=200_000))) == [1]


def test_calls_that_say_nothing_do_not_take_all_threads(net: Any) -> None:
    net.serve()
    silent, ends = threading.Event(), []

    def nothing() -> Iterator[bytes]:
        silent.wait(30)
        yield from ()

    with grpc.insecure_channel(net.hub.address) as channel:
        submit = channel.stream_unary(f"/{SERVICE}/Submit")
        calls = [submit.future(nothing()) for _ in range(300)]  # there are 208 threads
        net.join("a")
        assert names(list(net.ask("a"))) == [1]
        silent.set()
        ends = [call.code() for call in calls]
    assert ends.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 290


def test_a_full_spool_ends_the_exchange_with_one_error(net: Any) -> None:
    net.serve()
    net.folder.rmdir()
    net.join("a")
    with pytest.raises(RunError, match="cannot keep what clients send"):
        list(net.ask("a", size=600_000))
    net.folder.mkdir()


def test_closing_ends_an_exchange(net: Any) -> None:
    net.serve()
    threading.Timer(1.0, net.hub.close, ["the operator stopped it"]).start()
    with pytest.raises(RunError, match="the operator stopped it"):
        list(net.ask("a"))
    with pytest.raises(RunError, match="closed"):
        list(net.ask("a"))


# Who gets in


def test_a_second_process_of_one_name_is_refused(net: Any) -> None:
    net.serve()
    net.join("a")
    net.doorman.wait_for(("ready", "a"))
    with pytest.raises(RefusedError, match="in use") as refused:
        knock(net.hub.address, None, hello("a", "2"))
    assert not refused.value.final
    assert names(list(net.ask("a"))) == [1]


def test_the_same_process_takes_over(net: Any) -> None:
    net.serve()
    first = net.join("a", instance="1")
    net.doorman.wait_for(("ready", "a"))
    second = net.join("a", instance="1")
    net.doorman.wait_for(("ready", "a"), ("left", "a"), ("ready", "a"))
    first.join()
    assert isinstance(first.error, ConnectionLostError)
    assert names(list(net.ask("a"))) == [1]
    assert len(second.tasks) == 1


def test_a_dead_session_gives_way(net: Any) -> None:
    net.serve(heartbeat=0.4)
    silent = net.join("a", instance="1", heartbeat=3600)
    net.doorman.wait_for(("ready", "a"), ("left", "a"))
    net.join("a", instance="2", heartbeat=0.4)
    silent.join()
    assert names(list(net.ask("a"))) == [1]


def test_the_doorman_decides(net: Any) -> None:
    net.serve()
    net.doorman.objections["a"] = "its model does not fit"
    site = net.join("a")
    site.join()
    assert isinstance(site.error, RefusedError)
    assert (site.error.final, site.error.reason) == (True, "its model does not fit")
    assert net.doorman.events == [("ready", "a")]


def test_another_protocol_is_refused(net: Any) -> None:
    net.serve()
    with pytest.raises(RefusedError, match="same version") as refused:
        knock(net.hub.address, None, hello("a", protocol=99))
    assert refused.value.final


@pytest.mark.parametrize("words", [[b"{"], [b"x" * 70_000], [encode(hello("a")), encode(hello("a"))]])
def test_a_client_out_of_its_mind_is_refused(net: Any, words: list[bytes]) -> None:
    net.serve()
    with grpc.insecure_channel(net.hub.address) as channel:
        heard = list(channel.stream_stream(f"/{SERVICE}/Session")(iter(words)))
    assert b'"refused"' in heard[-1]
    net.join("a")
    assert names(list(net.ask("a"))) == [1]


def test_a_name_is_that_of_the_certificate(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)
    with pytest.raises(RefusedError, match="not of b") as refused:
        knock(net.hub.address, certificates.client("a"), hello("b"))
    assert refused.value.final


def test_a_session_is_of_use_to_its_certificate_only(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)

    def steal(task: Task, link: Link) -> None:
        with connect(net.hub.address, certificates.client("b"), hello("b")) as other:
            other.ready({})
            other._session = link._session
            with pytest.raises(ConnectionLostError, match="does not take part"):
                other.submit(task.notice, echoed(task))
        task.submit(echoed(task))

    net.join("a", steal, credentials=certificates.client("a"))
    assert names(list(net.ask("a"))) == [1]


def test_revocation_acts_at_once(net: Any, certificates: Any) -> None:
    revoked = threading.Event()

    def verify(certificate: bytes) -> str | None:
        return "its certificate is revoked" if revoked.is_set() and certificate == seen[0] else None

    seen: list[bytes] = []
    net.serve(credentials=certificates.server, verify=lambda pem: seen.append(pem) or verify(pem))
    site = net.join("a", lambda task, _: revoked.set() or time.sleep(0.1), credentials=certificates.client("a"))
    (reply,) = net.ask("a")
    assert reply.error.reason == "its certificate is revoked"
    site.join()
    assert isinstance(site.error, RefusedError)
    assert site.error.final
    net.doorman.wait_for(("left", "a"))
    net.join("b", credentials=certificates.client("b"))
    assert names(list(net.ask("b"))) == [1]


def test_what_cannot_be_verified_is_refused(net: Any, certificates: Any) -> None:
    def verify(_: bytes) -> str | None:
        raise OSError("no list of revocations")

    net.serve(credentials=certificates.server, verify=verify)
    with pytest.raises(RefusedError, match="cannot be verified"):
        knock(net.hub.address, certificates.client("a"), hello("a"))


def test_strangers_do_not_get_through_tls(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)
    other = type(certificates)()
    for credentials in (None, certificates.nobody, other.client("a")):
        with pytest.raises(ConnectionLostError):
            knock(net.hub.address, credentials, hello("a"))


def test_a_servers_certificate_is_no_clients(net: Any, certificates: Any) -> None:
    net.serve(credentials=certificates.server)
    with pytest.raises((RefusedError, ConnectionLostError)):
        knock(net.hub.address, certificates.client("a", ExtendedKeyUsageOID.SERVER_AUTH), hello("a"))


def test_plain_text_stays_on_this_machine(net: Any) -> None:
    offer = Offer(run="0" * 32, experiment_hash="", facts={})
    for listen in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(InputError, match="plain text"):
            Hub(listen, offer, net.doorman, net.folder)


def test_a_port_that_is_taken_is_an_error(net: Any) -> None:
    address = net.serve().address
    with pytest.raises(InputError, match="cannot listen"):
        Hub(address, Offer(run="0" * 32, experiment_hash="", facts={}), net.doorman, net.folder)


# What can be seen


def test_members_tell_what_clients_do(net: Any) -> None:
    net.serve()
    shown = []

    def wait(task: Task, link: Link) -> None:
        link.status("training \x1b[31m")
        for _ in range(600):
            if (member := net.hub.members()[0]).text:
                break
            time.sleep(0.05)
        shown.append(member)
        task.submit(echoed(task))

    site = net.join("a", wait, facts={"device": "cpu"})
    assert names(list(net.ask("a"))) == [1]
    (during,) = shown
    assert (during.name, during.connected, during.group, during.facts) == ("a", True, "1", {"device": "cpu"})
    assert during.text == "training \N{REPLACEMENT CHARACTER}[31m"
    (after,) = net.hub.members()
    assert (after.group, after.bytes_up, after.bytes_down) == ("", 4032, 4032)
    net.hub.close()
    site.join()
    net.doorman.wait_for(("left", "a"))
    assert [member.connected for member in net.hub.members()] == [False]


def test_health_can_be_asked(net: Any) -> None:
    net.serve()
    with grpc.insecure_channel(net.hub.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_refusals_are_logged_without_control_characters(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    net.serve()
    with caplog.at_level(logging.INFO), connect(net.hub.address, None, hello("a")) as link:
        link.decline("no \x1b[31m")
    assert "takes no part: no \N{REPLACEMENT CHARACTER}[31m" in caplog.text
