"""``m3 serve``: an OpenAI-compatible HTTP server over a bank."""

import json
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Set, configuration, overrides
from m3runtime.cli.terminal import say
from m3runtime.cli.write import write
from m3runtime.errors import InputError, PluginError

_TIMELINE = 512
"""Events that the timeline keeps, unless ``metrics.timeline`` is set."""


def serve(
    address: Annotated[str | None, typer.Option(help="The address to listen on; default: serve.address.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; default: serve.port. 0: a free one.")] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Serve without keys on an address that other machines reach.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve a small bank with SmolLM2-135M, which is written into .demo first.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="The adapter whose engine decodes, such as vllm, or a vLLM server's address; default: model.adapter."
        ),
    ] = None,
    engine_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of that engine: --engine-set max_model_len=4096."),
    ] = None,
    config: ConfigFile = None,
    set: Set = None,
) -> None:
    """Serve the bank and its model to clients of OpenAI's API, until Ctrl-C.

    Keys come from M3_KEYS and serve.keys_file. The log has one line of JSON for each request.
    """
    options = {key: _value(text) for key, text in overrides(engine_set, "--engine-set").items()}
    if engine is not None and "://" in engine:
        engine, options = "url", {"url": engine, **options}
    given = {"serve.address": address, "serve.port": port}
    set = [*(set or ()), *(f"{key}={one}" for key, one in given.items() if one is not None)]
    if demo:
        from m3runtime.cli.demo import FOLDER, SETTINGS, corpus
        from m3runtime.cli.demo import overrides as of_demo

        if config is not None:
            raise InputError("--demo has a configuration of its own; leave out --config")
        config, set = SETTINGS, [*(f"{key}={one}" for key, one in of_demo(FOLDER).items()), *set]
    settings = configuration(config, set)
    try:
        from m3runtime.serve import logs
        from m3runtime.serve.keys import Keys
        from m3runtime.serve.served import Served
        from m3runtime.serve.server import Server, check_address
    except ImportError as error:
        raise PluginError(f"m3 serve needs FastAPI and uvicorn ({error}): pip install 'm3runtime[serve]'") from error
    from m3runtime.plugins.loading import load
    from m3runtime.runtime import Runtime

    if "timeline" not in settings.metrics.model_fields_set:  # the page shows it
        metrics = settings.metrics.model_copy(update={"timeline": _TIMELINE})
        settings = settings.model_copy(update={"metrics": metrics})
    keys = Keys.load(settings.serve.keys_file)
    check_address(settings.serve, has_keys=keys.needed, without_keys=no_keys)
    if demo:
        write([corpus(FOLDER)], config=config, set=set)
    logs.configure()
    with ExitStack() as opened:
        # Reading only, so that other commands can write: what they add is seen as `recall.refresh` says.
        runtime = opened.enter_context(Runtime.open(settings, read_only=not settings.recall.cold_start))
        kind = load("adapters", engine or settings.model.adapter)
        adapter = kind.over(runtime, runtime.device, options)
        opened.callback(adapter.close)
        runtime.encoder = adapter  # refuses another model's bank
        served = Served.of(runtime, adapter, keys)
        server = Server(served)
        host = f"[{settings.serve.address}]" if ":" in settings.serve.address else settings.serve.address
        say(f"serving {served.name} at http://{host}:{server.port}", err=True)
        server.serve_until_stopped()


def _value(text: str) -> Any:
    """The value of an option: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
