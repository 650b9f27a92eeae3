"""`fedtrain client`: take part with one's own data in what a server runs."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from fedtrain.cli.terminal import say
from fedtrain.errors import InputError, InterruptedRunError

if TYPE_CHECKING:
    from fedtrain.deployment.session import Dial
    from fedtrain.deployment.site import Owner
    from fedtrain.link.identity import Identity

__all__ = ["app"]

app = typer.Typer(help="Take part with your own data in what a server runs.", invoke_without_command=True)

_IDENTITY = Path("identity")
_RENEWAL_SECONDS = 3600.0  # between two looks whether the certificate is due

IdentityFolder = Annotated[
    Path,
    typer.Option("--identity", metavar="DIR", help="Folder of the certificate and its key, as `client enroll` makes."),
]


@app.callback()
def client(
    context: typer.Context,
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="The server to dial.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Your file or folder of images; for a built-in data set, the folder of those.",
            show_default=False,
        ),
    ] = None,
    identity: IdentityFolder = _IDENTITY,
    home: Annotated[
        Path | None,
        typer.Option("--home", metavar="DIR", help="What lasts: ledgers, states, finished updates; NAME unless given."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="What you allow; see docs/privacy.md.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    share: Annotated[
        bool, typer.Option("--share", help="PATH holds all clients' rows; take your share by the experiment.")
    ] = False,
    code: Annotated[
        Path, typer.Option("--code", metavar="DIR", help="Folder of allowed code that is named by file.")
    ] = Path(),
    allow_code: Annotated[
        list[str] | None,
        typer.Option("--allow-code", metavar="NAME", help="Own task, loader or strategy to allow. Repeatable."),
    ] = None,
    insecure: Annotated[
        str | None,
        typer.Option("--insecure", metavar="NAME", help="Dial in plain text, under this name.", show_default=False),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try everything that taking part needs, and train nothing.")
    ] = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="End with this process.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End with the run, instead of waiting for the next.")] = False,
) -> None:
    """Take part with your own data in what a server runs. Stays until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    if server is None or data is None:
        raise InputError(
            "a client needs a server and data", hint="Try: fedtrain client --server HOST:PORT --data PATH; or --help"
        )
    if not data.exists():
        raise InputError("there is no such file or folder", got=str(data), hint="--data names this client's own data")
    from fedtrain.deployment.session import Client, Dial
    from fedtrain.deployment.site import Owner

    name, credentials = insecure, None
    if insecure is None:
        name = _valid(identity).name
        threading.Thread(target=_stay_valid, args=(identity, server), daemon=True).start()

        def credentials() -> object:
            return _valid(identity, server).channel_credentials()

    assert name, "it has one from either"
    owner = Owner(name, data, home or Path(name), share, device, policy, tuple(allow_code or ()), code)
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    dial = Dial(server, credentials, once)
    with _stopping():
        if check:
            _check(owner, dial)
            return
        Client(owner, dial, _say).run()


@app.command()
def enroll(
    token: Annotated[str, typer.Argument(help="What `fedtrain ca invite` printed.", show_default=False)],
    identity: IdentityFolder = _IDENTITY,
) -> None:
    """Redeem an invitation. The key is made here and stays here."""
    from fedtrain.cli.ca import enroll as redeem

    redeem(token, identity)


def _valid(folder: Path, server: str | None = None) -> Identity:
    """Load the identity; in the last third of its life, have the server certify it anew if that can be reached."""
    from fedtrain.link.enrolment import renew
    from fedtrain.link.identity import Identity

    own = Identity.load(folder)
    if server and own.renew_due():
        with contextlib.suppress(Exception):  # there are more occasions
            return renew(folder, server)
    return own


def _stay_valid(folder: Path, server: str) -> None:
    """Look after the certificate also while one connection lasts for weeks."""
    while True:
        time.sleep(_RENEWAL_SECONDS)
        with contextlib.suppress(Exception):
            _valid(folder, server)


def _end_with(parent: int) -> None:
    """Do not wait for a server that started this client and was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _check(owner: Owner, dial: Dial) -> None:
    """Print a preflight; exit code 1 if something is wrong."""
    from fedtrain.deployment.check import preflight

    fine = True
    for what, ok, text in preflight(owner, dial):
        say(f"{'ok  ' if ok else 'FAIL'} {what:11} {text}", indent=17)
        fine &= ok
    if not fine:
        raise typer.Exit(1)


def _say(text: str) -> None:
    typer.echo(f"{datetime.datetime.now().astimezone():%H:%M:%S} {text}")


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, and say what was kept."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "stopped; finished updates are kept", hint="Run the same command again to take part again"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
