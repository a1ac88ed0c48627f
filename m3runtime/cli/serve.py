"""``m3 serve``: an OpenAI-compatible HTTP server over a bank."""

from contextlib import ExitStack
from typing import Annotated

import typer

from m3runtime.cli.options import ConfigFile, Set, configuration
from m3runtime.cli.terminal import say
from m3runtime.errors import PluginError

_TIMELINE = 512
"""Events that the timeline keeps, unless ``metrics.timeline`` is set."""


def serve(
    address: Annotated[str | None, typer.Option(help="The address to listen on; default: serve.address.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; default: serve.port. 0: a free one.")] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Serve without keys on an address that other machines reach.")
    ] = False,
    config: ConfigFile = None,
    set: Set = None,
) -> None:
    """Serve the bank and its model to clients of OpenAI's API, until Ctrl-C.

    Keys come from M3_KEYS and serve.keys_file. The log has one line of JSON for each request.
    """
    given = {"serve.address": address, "serve.port": port}
    settings = configuration(config, [*(set or ()), *(f"{key}={one}" for key, one in given.items() if one is not None)])
    try:
        from m3runtime.serve import logs
        from m3runtime.serve.keys import Keys
        from m3runtime.serve.served import Served
        from m3runtime.serve.server import Server, check_address
    except ImportError as error:
        raise PluginError(f"m3 serve needs FastAPI and uvicorn ({error}): pip install 'm3runtime[serve]'") from error
    from m3runtime import assembly
    from m3runtime.runtime import Runtime

    if "timeline" not in settings.metrics.model_fields_set:  # the page shows it
        metrics = settings.metrics.model_copy(update={"timeline": _TIMELINE})
        settings = settings.model_copy(update={"metrics": metrics})
    keys = Keys.load(settings.serve.keys_file)
    check_address(settings.serve, has_keys=keys.needed, without_keys=no_keys)
    logs.configure()
    with ExitStack() as opened:
        # Reading only, so that other commands can write: what they add is seen as `recall.refresh` says.
        runtime = opened.enter_context(Runtime.open(settings, read_only=not settings.recall.cold_start))
        adapter = assembly.open_adapter(settings, runtime.device)
        opened.callback(adapter.close)
        runtime.encoder = adapter  # refuses another model's bank
        served = Served.of(runtime, adapter, keys)
        server = Server(served)
        host = f"[{settings.serve.address}]" if ":" in settings.serve.address else settings.serve.address
        say(f"serving {served.name} at http://{host}:{server.port}", err=True)
        server.serve_until_stopped()
