"""The command ``m3``. Heavy libraries are imported only when a command runs."""

import atexit
import gc
import os
import sys
from io import TextIOWrapper

import typer

from m3runtime.cli import (
    ask,
    bank,
    bench,
    bias,
    codec,
    config,
    exchange,
    init,
    interrupts,
    plan,
    serve,
    sync,
    top,
    train,
    verify,
    write,
)
from m3runtime.cli import eval as evaluation
from m3runtime.cli.terminal import say
from m3runtime.errors import BankError, CodecError, ConfigError, InputError, M3Error, PluginError

app = typer.Typer(
    name="m3",
    help="Explicit memories for language models: write a corpus into a bank, answer from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS = {
    "Use a bank": (init.init, write.write, sync.sync, ask.ask, ask.chat, serve.serve, bank.search),
    "Keep a bank": (
        *(bank.inspect, bank.forget, bank.compact, exchange.export, exchange.import_),
        *(verify.verify, config.config, plan.plan, top.top, codec.app),
        bias.calibrate_bias,
    ),
    "Lab: evaluate, measure, train": (evaluation.app, bench.app, train.train),
}
"""The commands by the panel of `m3 --help` that lists them."""
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, rich_help_panel=_panel)
        else:
            app.command(_command.__name__.rstrip("_").replace("_", "-"), rich_help_panel=_panel)(_command)

USER_ERRORS = (ConfigError, InputError, PluginError, BankError, CodecError)
"""Errors that the user can correct: exit code 2. Other failures have exit code 1."""
_INTERRUPTED = 130


def main() -> None:
    """Run ``m3``. An error is printed as one line on standard error."""
    # Idle threads of OpenMP would otherwise spin, and with one busy process elsewhere every step waits for a core that
    # a spinning thread holds. The library reads it when torch loads it, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(100_000, 50, 50)  # heavy libraries make objects that stay; searching them takes a fifth of imports
    atexit.register(_end)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        with interrupts.heard():
            app(standalone_mode=True)
    except (M3Error, OSError) as error:
        _complain(str(error))
        sys.exit(2 if isinstance(error, USER_ERRORS) else 1)
    except SystemExit as error:
        if error.code == _INTERRUPTED:  # typer exits without a message
            _complain("interrupted; nothing is half-written")
        raise
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        _complain("interrupted; nothing is half-written")
        sys.exit(_INTERRUPTED)


def _is_interrupt(error: BaseException | None) -> bool:
    """Was it raised for an interrupt, or while one was being handled?

    A library that is interrupted in its first call (numba, which compiles then) may fail in the next one, which closes
    what was open.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _end() -> None:
    # Python searches all objects once more before it ends, which takes up to a sixth of a command: frozen ones are left
    # out. Triton's extension (nanobind) would report as leaks what is not searched.
    if "triton" not in sys.modules:
        gc.freeze()


def _complain(message: str) -> None:
    say(f"m3: {' '.join(message.split())}", err=True)
