"""`fedtrain client`: take part with one's own data in what a server runs."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from fedtrain.cli.terminal import say
from fedtrain.errors import InputError, InterruptedRunError, shorten

if TYPE_CHECKING:
    import grpc

    from fedtrain.deployment.session import Dial
    from fedtrain.deployment.site import Owner
    from fedtrain.link.identity import Identity

__all__ = ["app"]

app = typer.Typer(help="Take part with your own data in what a server runs.", invoke_without_command=True)

_LOG = logging.getLogger("fedtrain.client")
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
    _refuse_missing(data, policy, code)
    from fedtrain.deployment.session import Client, Dial
    from fedtrain.deployment.site import Owner
    from fedtrain.link.identity import Identity

    own = None if insecure is not None else Identity.load(identity)
    name = own.name if own else insecure
    assert name, "it has one from either"
    owner = Owner(name, data, home or Path(name), share, device, policy, tuple(allow_code or ()), code)
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    certificate = _Certificate(identity, server) if own else None
    dial = Dial(server, certificate.credentials if certificate else None, once)
    with _stopping():
        if check:
            _check(owner, dial, own)
            return
        taking_part = Client(owner, dial, _say)
        if certificate:
            threading.Thread(target=certificate.watch, args=(taking_part.reconnect,), daemon=True).start()
        taking_part.run()


@app.command()
def enroll(
    token: Annotated[str, typer.Argument(help="What `fedtrain ca invite` printed.", show_default=False)],
    identity: IdentityFolder = _IDENTITY,
) -> None:
    """Redeem an invitation. The key is made here and stays here."""
    from fedtrain.cli.ca import enroll as redeem

    redeem(token, identity)


class _Certificate:
    """What this client shows; in the last third of its life the server is asked to certify it anew.

    Args:
        folder: of the identity.
        server: "host:port" to ask.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, server
        self._lock = threading.Lock()
        self._shown, self._trouble = 0, ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Make them of the certificate that is in force now.

        Raises:
            InputError: it is missing, damaged or expired.
        """
        own = self._current()
        self._shown = own.serial
        return own.channel_credentials()

    def watch(self, changed: Callable[[], None]) -> None:
        """Look after the certificate also while one connection lasts for weeks; never returns.

        Args:
            changed: is called while the connection shows another certificate than the one in force.
        """
        while True:
            time.sleep(_RENEWAL_SECONDS)
            try:
                own = self._current()
            except Exception as error:
                self._warn(f"the certificate cannot be used: {shorten(str(error), 500)}")
            else:
                if own.serial != self._shown:
                    changed()

    def _current(self) -> Identity:
        from fedtrain.link.enrolment import renew
        from fedtrain.link.identity import Identity

        with self._lock:
            own = Identity.load(self._folder)
            if own.renew_due():
                try:
                    own = renew(self._folder, self._server)
                except Exception as error:  # there are more occasions
                    ends = f"{own.not_after:%Y-%m-%d %H:%M} UTC"
                    self._warn(f"the certificate, which ends on {ends}, is not renewed: {shorten(str(error), 500)}")
                else:
                    self._trouble = ""
            return own

    def _warn(self, trouble: str) -> None:
        """Tell a trouble once for as long as it stays the same."""
        if trouble != self._trouble:
            self._trouble = trouble
            _LOG.warning("%s", trouble)


def _refuse_missing(data: Path, policy: Path | None, code: Path) -> None:
    """Refuse paths that lead nowhere before anything is loaded."""
    if not data.exists():
        raise InputError("there is no such file or folder", got=data, hint="--data names this client's own data")
    if policy is not None and not policy.is_file():
        raise InputError("there is no such policy file", got=policy, hint="--policy names what you allow")
    if not code.is_dir():
        raise InputError("there is no such folder of code", got=code, hint="--code names the folder of your files")


def _end_with(parent: int) -> None:
    """Do not wait for a server that started this client and was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _check(owner: Owner, dial: Dial, own: Identity | None) -> None:
    """Print a preflight; exit code 1 if something is wrong."""
    from fedtrain.deployment.check import preflight

    fine = True
    dates = (own.not_before, own.not_after) if own else None
    for what, ok, text in preflight(owner, dial, dates):
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
