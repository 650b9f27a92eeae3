"""The commands. Heavy imports stay inside them, so that `fedtrain --help` answers at once."""

from __future__ import annotations

import gc
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
import typer.core

from fedtrain import __version__
from fedtrain.cli.beforehand import audit, check, plan
from fedtrain.cli.ca import app as ca_app
from fedtrain.cli.client import app as client_app
from fedtrain.cli.data import app as data_app
from fedtrain.cli.lr_find import lr_find
from fedtrain.cli.many import compare, crossval, sweep
from fedtrain.cli.options import (
    AsJson,
    DataRoot,
    ExperimentFile,
    Out,
    Overrides,
    Quiet,
    RunArgument,
    folders,
    refuse_what_does_nothing,
)
from fedtrain.cli.privacy import app as privacy_app
from fedtrain.cli.terminal import say
from fedtrain.errors import FedtrainError, InputError

if TYPE_CHECKING:
    from fedtrain.cli.progress import RunObserver

__all__ = ["app", "main"]

# With rich installed, typer escapes brackets for it, "\\[required]", also where markup is switched off as here.
typer.core.HAS_RICH = False


class _Engine(Enum):
    """What runs a simulation's clients."""

    own = "own"
    ray = "ray"


class _Runtime(Enum):
    """What carries a deployment's messages."""

    own = "own"
    flower = "flower"


_PATIENCE = {_Runtime.own: 60.0, _Runtime.flower: 3600.0}  # a fleet's is for a whole round: flwr tells of no progress
_INTERRUPTED = 130  # typer returns it for a KeyboardInterrupt of its own

app = typer.Typer(
    name="fedtrain",
    help="Train one PyTorch model across many clients that keep their data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data", rich_help_panel=None)
app.add_typer(privacy_app, name="privacy", rich_help_panel=None)
app.add_typer(client_app, name="client", rich_help_panel=None)
app.add_typer(ca_app, name="ca", rich_help_panel=None)


def main() -> NoReturn:
    """Run the command line; an error that fedtrain can name is one message and an exit code, never a traceback."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is told by us
    import fedtrain.collecting  # noqa: F401 - a command is over sooner

    try:
        code = app(standalone_mode=False)
    except FedtrainError as error:
        say(f"fedtrain: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # by click: the reader of our output is gone
            raise
        say(f"fedtrain: the experiment's own code ended the program: got sys.exit({error.code!r})", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); what cannot be flushed must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, Exception) as error:
        if _is_interrupt(error):
            code = _INTERRUPTED
        elif error.__class__.__module__.startswith("click"):
            told = _set_instead(error)
            if told:
                error.possibilities = None  # type: ignore[union-attr]  # of options that look alike
            error.show()  # type: ignore[union-attr]
            if told:
                say(told, err=True)
            sys.exit(2)
        else:
            raise
    if code == _INTERRUPTED:
        typer.echo("fedtrain: interrupted", err=True)
    sys.exit(code or 0)


def _set_instead(error: BaseException) -> str:
    """How to change a value of the experiment that was given as an option, as in other tools."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any("--set" in param.opts for param in context.command.params):
        return ""
    from fedtrain.experiment.faults import places_of

    places = places_of(option.lstrip("-").replace("-", "_"))
    return f"Values of the experiment are changed by --set, such as --set {places[0]}=VALUE" if places else ""


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries wrap it while they are being imported."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | typer.Abort):
            return True
        error = error.__cause__ or error.__context__
    return False


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train one PyTorch model across many clients that keep their data."""
    if version:
        typer.echo(f"fedtrain {__version__}")
        raise typer.Exit


@app.command()
def init(
    target: Annotated[
        str | None,
        typer.Argument(help="A template's name (writes NAME.toml) or the file to write.", show_default=False),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--from", help="The template to write into FILE; digits unless given.")
    ] = None,
) -> None:
    """Write a commented experiment file. Without arguments, list what there is to start from."""
    from fedtrain.experiment import TEMPLATES, write

    if target is None:
        if template is not None:
            raise InputError("--from needs the file to write", hint=f"Try: fedtrain init my.toml --from {template}")
        width = max(map(len, TEMPLATES))
        typer.echo("Templates:")
        for name, known in TEMPLATES.items():
            say(f"  {name:{width}}  {known.description}", indent=width + 2)
        say("\nWrite one with: fedtrain init NAME, or: fedtrain init FILE --from NAME")
        return
    path = write(target, template)
    say(f"Wrote {path}. Run it with: fedtrain simulate {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of experiment files, for editors."""
    from fedtrain.experiment import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def simulate(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    out: Out = None,
    data_root: DataRoot = None,
    engine: Annotated[
        _Engine, typer.Option("--engine", help="Processes of our own, or Flower's on Ray: for clusters and many GPUs.")
    ] = _Engine.own,
    cpus: Annotated[float, typer.Option("--ray-cpus", min=0.01, help="Cores per client under Ray.")] = 1.0,
    gpus: Annotated[float, typer.Option("--ray-gpus", min=0, help="GPUs per client under Ray, also 0.5.")] = 0.0,
    ray: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a Ray cluster; one is started here unless given.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment on this machine. The same command again resumes it, or says that it is complete."""
    from fedtrain.experiment import load
    from fedtrain.simulations.forkserver import start_importing

    experiment = load(experiment_file, overrides or ())
    start_importing(experiment)  # before anything here imports torch: the two do so side by side
    from fedtrain.cli.running import carry_out, run_folder

    folder = run_folder(experiment, out)

    def run(observer: RunObserver) -> None:
        from fedtrain.simulations.run import Backend, Places, simulate

        # What was imported stays to the end, where the collector would look through it for half a second. A user's
        # objects come later, and are finalised.
        gc.freeze()
        backend = None
        if engine is _Engine.ray:
            from functools import partial

            from fedtrain.simulations.ray import RayEngine, RayResources

            backend = Backend(partial(RayEngine, RayResources(cpus, gpus, ray)))
        base, root = folders(experiment_file, experiment, data_root)
        simulate(experiment, Places(base, folder.path, root), observer, backend)

    carry_out(experiment, folder, run, quiet=quiet, as_json=as_json)


@app.command()
def server(
    context: typer.Context,
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    out: Out = None,
    data_root: DataRoot = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where clients dial.")
    ] = "127.0.0.1:7443",
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="DIR", help="The authority's folder: mutual TLS.", show_default=False),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address by which clients reach this machine. Repeatable."),
    ] = None,
    enrol: Annotated[
        str | None,
        typer.Option("--enrol", metavar="HOST:PORT", help="Serve enrolment here, too.", show_default=False),
    ] = None,
    own_data: Annotated[
        bool, typer.Option("--own-data", help="Clients bring their own rows; the server reads none.")
    ] = False,
    min_clients: Annotated[
        int | None, typer.Option("--min-clients", min=1, help="Clients to wait for; all unless given.")
    ] = None,
    wait: Annotated[float | None, typer.Option("--wait", min=0, help="Seconds to wait for them; no end.")] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            "--patience",
            min=0.1,
            help="Seconds without progress until a round goes on without; 60. With --runtime flower, where nobody "
            "tells of progress, seconds that a round may take; 3600.",
        ),
    ] = None,
    max_clients: Annotated[int, typer.Option("--max-clients", min=1, help="Clients at once.")] = 64,
    metrics: Annotated[
        int | None, typer.Option("--metrics", min=0, help="Port on this machine for Prometheus.", show_default=False)
    ] = None,
    runtime: Annotated[
        _Runtime, typer.Option("--runtime", help="Our own server, or a stock Flower fleet: see docs/deployment.md.")
    ] = _Runtime.own,
    superlink: Annotated[
        str | None,
        typer.Option(
            "--superlink",
            metavar="HOST:PORT",
            help="Of the fleet; one is started here unless given.",
            show_default=False,
        ),
    ] = None,
    with_clients: Annotated[
        int, typer.Option("--with-clients", metavar="N", min=0, help="Start the N clients on this machine.")
    ] = 0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text also beyond this machine: nothing is secret then.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve an experiment to clients that dial in. The same command again resumes it."""
    from fedtrain.cli.running import run_folder
    from fedtrain.experiment import load
    from fedtrain.link.handshakes import watched

    refuse_what_does_nothing(context, fleet=runtime is _Runtime.flower)
    experiment = load(experiment_file, overrides or ())
    base, root = folders(experiment_file, experiment, data_root)
    folder = run_folder(experiment, out)
    patience = patience or _PATIENCE[runtime]
    if runtime is _Runtime.flower:
        from fedtrain.cli.running import carry_out
        from fedtrain.fleet.run import Fleet, run_on_flower
        from fedtrain.simulations.run import Places, sigterm_interrupts

        fleet = Fleet(superlink, ca, insecure, patience=patience)

        def run(observer: RunObserver) -> None:
            with sigterm_interrupts():
                run_on_flower(experiment, Places(base, folder.path, root), observer, fleet)

        carry_out(experiment, folder, run, quiet=quiet, as_json=as_json)
        return
    with watched():  # before gRPC is imported
        from fedtrain.cli.server import ServerOptions, serve_experiment
        from fedtrain.simulations.run import Places

        options = ServerOptions(
            listen="127.0.0.1:0" if with_clients else listen,
            enrol=enrol,
            authority=ca,
            hosts=hosts or (),
            own_data=own_data,
            min_clients=min_clients,
            wait=wait,
            patience=patience,
            max_clients=max_clients,
            metrics=metrics,
            with_clients=with_clients,
            insecure=insecure,
        )
        serve_experiment(experiment, Places(base, folder.path, root), options, quiet=quiet, as_json=as_json)


@app.command()
def stop(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the end of the round.")] = False,
) -> None:
    """Stop a server or a simulation after its round. The command that started it resumes it."""
    import signal
    import time

    from fedtrain.rundir import RunFolder

    folder = RunFolder(run)
    if (process := folder.holder()) is None:
        raise InputError("nothing is running in this folder", got=run)
    if now:
        os.kill(process, signal.SIGTERM)
    else:
        folder.ask_to_stop()
        typer.echo("It stops when its round has ended.")
    while folder.holder() == process:
        time.sleep(0.1)
    typer.echo("Stopped.")


app.command()(check)
app.command("lr-find")(lr_find)
app.command()(plan)
app.command()(audit)


@app.command()
def report(run: RunArgument) -> None:
    """Write a run's report anew and print its path."""
    from fedtrain.cli.running import summary, write_report
    from fedtrain.rundir import RunFolder

    folder = RunFolder.open(run)
    for line in summary(folder):
        say(line)
    typer.echo(f"Report: {write_report(folder)}")


app.command()(compare)
app.command()(sweep)
app.command()(crossval)


@app.command()
def predict(
    run: RunArgument,
    inputs: Annotated[
        Path, typer.Argument(metavar="INPUT", help="CSV, Parquet, NPZ, an image, a folder of images, or a text.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write CSV here instead of to the terminal.", show_default=False)
    ] = None,
) -> None:
    """Apply a run's model to new inputs. Prints CSV, one row per input."""
    from fedtrain.cli.tables import write_csv
    from fedtrain.predict import predictions

    table = predictions(run, inputs)
    if table.note:
        say(f"note: {table.note}", err=True)
    write_csv(table, out)
