"""`bitplan`: every command, registered here and written beside this file."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from service.cli.allocate import allocate
from service.cli.calibrate import calibrate
from service.cli.checkpoint import apply, checkpoint
from service.cli.convert import convert
from service.cli.correlate import correlate
from service.cli.evaluate import evaluate
from service.cli.exits import Exit, refuse
from service.cli.explain import explain
from service.cli.export import export
from service.cli.fetch import fetch
from service.cli.frontier import frontier
from service.cli.keys import audit, keys, quotas
from service.cli.lint import lint
from service.cli.operate import backup, doctor, gc, restore
from service.cli.remote import cancel, jobs, models, plan, resume, scores, status, submit, watch
from service.cli.run import run
from service.cli.serve import migrate, runner, serve
from service.logs import hush_libraries

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

PANELS = {
    "On this machine": (
        run,
        correlate,
        calibrate,
        convert,
        fetch,
        apply,
        checkpoint,
        evaluate,
        export,
        allocate,
        explain,
        frontier,
        lint,
    ),
    "The service": (serve, runner, migrate, quotas, audit, doctor, gc, backup, restore),
    "A server's jobs": (submit, watch, status, jobs, models, scores, plan, cancel, resume),
}
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(keys, name="keys", rich_help_panel="The service")


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"bitplan {version('bitplan')}\n")
        raise typer.Exit


@app.callback()
def bitplan(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Decide how many bits each layer of a neural network gets: measured, exact, proven."""


def main() -> None:
    """The entry point of the `bitplan` command."""
    hush_libraries()
    if "--json" in sys.argv[1:]:
        sys.exit(_run_for_machines())
    app()


def _run_for_machines() -> int:
    """Run the command; what is wrong with the command line is told in JSON too."""
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else int(Exit.DONE)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        try:
            refuse(usage(), Exit.BAD_INPUT, as_json=True)
        except typer.Exit as end:
            return end.exit_code
        raise


if __name__ == "__main__":
    main()
