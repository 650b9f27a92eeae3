"""`fedtrain ca`: who takes part. An authority invites sites, signs their certificates and revokes them."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from fedtrain.cli.terminal import say
from fedtrain.errors import InputError

__all__ = ["app", "enroll"]

app = typer.Typer(help="Decide who takes part: invite, certify and revoke sites.", no_args_is_help=True)

_DEFAULT = Path("ca")
_OVER = ("revoked", "expired")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}

Folder = Annotated[Path, typer.Option("--ca", metavar="DIR", help="The authority's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The site's name.", show_default=False)]


@app.command()
def init(ca: Folder = _DEFAULT) -> None:
    """Make a certificate authority. Its key decides who takes part."""
    from fedtrain.link.authority import Authority

    Authority.init(ca)
    say(f"Made a certificate authority in {ca}. Whoever reads {ca / 'key.pem'} can let anybody in: guard it.")
    say(f"Next, invite a site: fedtrain ca invite NAME --server HOST:7444{_chosen(ca)}")


@app.command()
def invite(
    name: Name,
    server: Annotated[
        str,
        typer.Option("--server", metavar="HOST:PORT", help="Where the site reaches `ca serve`.", show_default=False),
    ],
    valid: Annotated[str, typer.Option("--valid", metavar="TIME", help="Until it expires: 3d, 12h or 30m.")] = "3d",
    replace: Annotated[bool, typer.Option("--replace", help="Revoke the certificates that it has.")] = False,
    ca: Folder = _DEFAULT,
) -> None:
    """Invite a site. Prints a token for one use."""
    from fedtrain.link.authority import Authority

    lifetime = _time(valid)
    token = Authority.open(ca).invite(name, lifetime, server, replace=replace)
    say(f"Invited {name} until {_minute(datetime.now(UTC) + lifetime)}. The site runs:")
    typer.echo(f"\n  fedtrain client enroll {token}\n")  # whole, also in a narrow terminal
    say("Whoever has the token first can enrol under this name: send it on a channel that you trust.")
    say(f"Next, serve enrolment: fedtrain ca serve --listen 0.0.0.0:{server.rpartition(':')[2]}{_chosen(ca)}")


@app.command()
def revoke(name: Name, ca: Folder = _DEFAULT) -> None:
    """Revoke a site's certificates and its invitation."""
    from fedtrain.link.authority import Authority

    count = Authority.open(ca).revoke(name)
    say(f"Revoked {name}: {count} valid {'certificate' if count == 1 else 'certificates'}; no invitation is open.")
    say(f"To let it in again: fedtrain ca invite {name} --server HOST:PORT{_chosen(ca)}")


@app.command(name="list")
def list_(
    ca: Folder = _DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List certificates and invitations."""
    from fedtrain.link.authority import Authority

    authority, now = Authority.open(ca), datetime.now(UTC)
    rows: list[tuple[str, str, str, datetime]] = [(one.name, one.kind, *one.state(now)) for one in authority.issued()]
    rows += [(one.name, "invitation", *one.state(now)) for one in authority.invitations()]
    if as_json:
        entries = [dict(zip(("name", "kind", "state", "time"), row)) for row in rows]
        typer.echo(json.dumps({"entries": entries}, indent=2, default=datetime.isoformat))
        return
    if not rows:
        say(f"Nobody yet. Invite a site: fedtrain ca invite NAME --server HOST:7444{_chosen(ca)}")
        return
    typer.echo(f"{'name':24} {'kind':10} {'state':8} time")
    for name, kind, state, moment in rows:
        typer.echo(f"{name:24} {kind:10} {state:8} {'since' if state in _OVER else 'until'} {_minute(moment)}")


@app.command()
def serve(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; always by TLS.")
    ] = "0.0.0.0:7444",
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address by which sites reach this machine. Repeatable."),
    ] = None,
    ca: Folder = _DEFAULT,
) -> None:
    """Serve enrolment alone. Stops at Ctrl-C."""
    from fedtrain.link.authority import Authority
    from fedtrain.link.enrolment import serving

    with _log(), _stopping() as stopped, serving(Authority.open(ca), listen, hosts or ()) as address:
        say(f"Enrolment is served on {address}. Stop it with Ctrl-C.")
        stopped.wait()
    say("Stopped.")


def enroll(token: str, identity_folder: Path) -> None:
    """Redeem a token and tell what comes next.

    Raises:
        InputError: the token is not valid, the server refuses, or the folder is none or has a valid identity.
        RunError: the server does not answer, or the folder cannot be written.
    """
    from fedtrain.link.enrolment import enrol

    if identity_folder.exists() and not identity_folder.is_dir():
        raise InputError("--identity is no folder", got=identity_folder, hint="Name a folder, or none: it is made")
    identity = enrol(token, identity_folder)
    say(f"Enrolled as {identity.name}, until {_minute(identity.not_after)}. The key in {identity_folder} stays here.")
    say("Next, take part: fedtrain client --server HOST:PORT --data PATH")


def _time(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([dhm])", text)
    if found is None:
        raise InputError("no valid time", got=text, expected="a number with d, h or m, such as 3d, 12h or 30m")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _chosen(ca: Path) -> str:
    return "" if ca == _DEFAULT else f" --ca {ca}"


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


@contextlib.contextmanager
def _log() -> Iterator[None]:
    """Show what the library logs about enrolments."""
    logger, handler = logging.getLogger("fedtrain.link"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stopped = threading.Event()
    before = {one: signal.signal(one, lambda *_: stopped.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
