"""`bitplan`: every command, registered here and written beside this file."""

from __future__ import annotations

import typer

from service.cli.allocate import allocate
from service.cli.checkpoint import apply, evaluate
from service.cli.export import export
from service.cli.remote import cancel, jobs, models, plan, resume, scores, status, submit, watch
from service.cli.run import run
from service.cli.serve import migrate, runner, serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decide how many bits each layer of a neural network gets: measured, exact, proven.",
)

PANELS = {
    "On this machine": (run, apply, evaluate, export, allocate),
    "The service": (serve, runner, migrate),
    "A server's jobs": (submit, watch, status, jobs, models, scores, plan, cancel, resume),
}
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


def main() -> None:
    """The entry point of the `bitplan` command."""
    app()


if __name__ == "__main__":
    main()
