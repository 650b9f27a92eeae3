"""gRPC as both ends use it: options, method names, and what counts as this machine."""

from __future__ import annotations

import ipaddress
import socket

import grpc

from fedtrain.link.headers import HEADER_LIMIT

__all__ = ["HEARTBEAT", "SERVICE", "SILENCE", "channel_options", "details", "is_loopback", "server_options"]

SERVICE = "fedtrain.Link"

HEARTBEAT = 5.0
"""Seconds between two signs of life."""

SILENCE = 3
"""Heartbeats without a sign of life after which a peer counts as gone."""

_SAID = 120  # characters of what gRPC says of an error

_Options = list[tuple[str, int]]

# The largest messages are those with the experiment, or with an index of arrays.
_SIZES: _Options = [(f"grpc.max_{way}_message_length", 2 * HEADER_LIMIT) for way in ("send", "receive")]


def server_options(heartbeat: float) -> _Options:
    """Options of the server: bounded messages, and peers that vanish are noticed."""
    pings: _Options = [
        ("grpc.http2.min_ping_interval_without_data_ms", int(500 * heartbeat)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(500 * heartbeat)),
        ("grpc.http2.max_ping_strikes", 0),
    ]
    return [*_SIZES, *_keepalive(heartbeat), *pings, ("grpc.so_reuseport", 0)]


def channel_options(heartbeat: float) -> _Options:
    """Options of a channel: as the server's; a new channel does not wait because an older one had to."""
    return [*_SIZES, *_keepalive(heartbeat), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


def _keepalive(heartbeat: float) -> _Options:
    """Notice peers that are gone while much is on its way; else the heartbeats of a session do, and sooner.

    On a slow line a ping waits for minutes behind the data that was sent before it, and a throttled one acknowledges in
    large steps: keepalive_timeout is the system's TCP_USER_TIMEOUT, and no limit for pings.
    """
    return [
        ("grpc.keepalive_time_ms", int(2000 * heartbeat)),
        ("grpc.keepalive_timeout_ms", int(12_000 * heartbeat)),
        ("grpc.http2.ping_timeout_ms", int(60_000 * heartbeat)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def details(error: grpc.RpcError) -> str:
    """Say what broke a call; the text may come from the peer."""
    if isinstance(error, grpc.Call):
        said = " ".join((error.details() or "").rpartition("last error: ")[2].split())
        tail = said if len(said) <= _SAID else f"…{said[1 - _SAID :]}"  # the cause comes last
        return f"{error.code().name.lower().replace('_', ' ')}: {tail}"
    return "the call was ended"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone, by all of its addresses."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
