"""The command ``m3``. Nothing heavy is imported before a command runs."""

import sys

import typer

from m3runtime.cli import ask, bank, config, write
from m3runtime.errors import BankError, ConfigError, InputError, M3Error, PluginError

app = typer.Typer(
    name="m3",
    help="Explicit memories for language models: write a corpus into a bank, answer from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("write")(write.write)
app.command("ask")(ask.ask)
app.command("chat")(ask.chat)
app.command("search")(bank.search)
app.command("inspect")(bank.inspect)
app.command("forget")(bank.forget)
app.command("config")(config.config)

USER_ERRORS = (ConfigError, InputError, PluginError, BankError)
"""What the user can mend; these end in exit code 2, other failures in 1."""


def main() -> None:
    """Run ``m3``. Errors are one line on standard error."""
    try:
        app(standalone_mode=True)
    except M3Error as error:
        print(f"m3: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(2 if isinstance(error, USER_ERRORS) else 1)
    except KeyboardInterrupt:
        print("m3: interrupted; nothing is half-written", file=sys.stderr)  # noqa: T201
        sys.exit(130)


if __name__ == "__main__":
    main()
