"""`compresskit`: one file per command; a command's file is imported when it is named."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from compresskit.errors import CompressKitError, Fault, RunError
from compresskit.registry import locate, nearest

COMMANDS = {
    "prune": "Zero the weights of a model that a method finds least useful.",
    "sparse-train": "Train a model while its weights become zero.",
    "distill": "Train a student to match a teacher.",
    "quantize": "Put the weights of a model onto a grid of few bits.",
    "qat": "Train a model while it computes as its quantised form will.",
    "qlora": "Train adapters on a model that is frozen in few bits.",
    "finetune": "Train a model on text, keeping its zeros.",
    "run": "Run every stage of a recipe.",
    "plan": "Show what a recipe will do; load no weights.",
    "bench": "Measure size, quality, latency and memory.",
    "report": "Write the report of artifacts or records.",
    "export": "Write a model as llama.cpp, onnxruntime, torchao ... load it.",
    "inspect": "Show what a model is, layer by layer, and what its zeros are worth.",
    "cache": "List or remove what is kept from run to run.",
    "doctor": "Tell what this machine has and what is missing.",
    "demo": "Prune, distil and quantise the bundled model.",
}


class Commands(click.Group):
    """A group whose commands are found by name in this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's file."""
        if cmd_name not in COMMANDS:
            ctx.fail(f"no command {cmd_name!r}; did you mean: {nearest(cmd_name, COMMANDS)}?")
        name = cmd_name.replace("-", "_")
        command: click.Command = locate(f"compresskit.cli.{name}:{name}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Turn every error that compresskit raises on purpose into one paragraph and its exit code."""
        try:
            return super().invoke(ctx)
        except CompressKitError as error:
            if ctx.params.get("traceback"):
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if ctx.params.get("traceback") or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            cure = "Free some, or move TMPDIR, COMPRESSKIT_CACHE or the output; then run it again."
            where = str(error.filename or "a file")
            fault = Fault(where, "room on the disk", str(error.strerror), cure)
            click.echo(f"error: {fault}", err=True)
            sys.exit(RunError.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="compresskit")
@click.option("--traceback", is_flag=True, help="Show where an error was raised.")
def main(traceback: bool) -> None:
    """Make Hugging Face models smaller and faster, and prove it."""
