"""The command ``m3``. Nothing heavy is imported before a command runs."""

import sys
from io import TextIOWrapper

import typer

from m3runtime.cli import ask, bank, bench, codec, config, interrupts, plan, top, train, verify, write
from m3runtime.cli import eval as evaluation
from m3runtime.errors import BankError, CodecError, ConfigError, InputError, M3Error, PluginError

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
app.command("verify")(verify.verify)
app.command("config")(config.config)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("top")(top.top)
app.add_typer(evaluation.app)
app.add_typer(codec.app)
app.add_typer(bench.app)

USER_ERRORS = (ConfigError, InputError, PluginError, BankError, CodecError)
"""What the user can mend; these end in exit code 2, other failures in 1."""
_INTERRUPTED = 130


def main() -> None:
    """Run ``m3``. Errors are one line on standard error."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text; JSON escapes them alike
    try:
        with interrupts.heard():
            app(standalone_mode=True)
    except (M3Error, OSError) as error:
        _complain(str(error))
        sys.exit(2 if isinstance(error, USER_ERRORS) else 1)
    except SystemExit as error:
        if error.code == _INTERRUPTED:  # typer's own, without a word
            _complain("interrupted; nothing is half-written")
        raise
    except KeyboardInterrupt:
        _complain("interrupted; nothing is half-written")
        sys.exit(_INTERRUPTED)


def _complain(message: str) -> None:
    print(f"m3: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - the command's own output
