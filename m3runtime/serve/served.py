"""`Served`: the parts that the routes of one server share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.config.serve import ServeConfig
from m3runtime.runtime import Runtime
from m3runtime.serve.gate import Gate
from m3runtime.serve.keys import Keys
from m3runtime.serve.meter import ServeMeter

Reason = Literal["gone", "timeout", "stopped"]
"""Why answers are cancelled: their client went, it took too long, or the server is being stopped."""
Cancel = Callable[[Reason], None]


@dataclass(frozen=True, slots=True)
class Served:
    """A bank and a model that are served. All parts may be used by any thread, except the gate (the event loop's)."""

    runtime: Runtime
    adapter: Adapter
    config: Config
    keys: Keys
    name: str
    """The name of the model in the API."""
    gate: Gate
    """Counts the answers under way."""
    meter: ServeMeter
    running: set[Cancel] = field(default_factory=set, compare=False)
    """Cancels each of the requests whose answers are under way, in the event loop."""

    @property
    def embedder_name(self) -> str:
        """The name of the bank's embedder in the API."""
        return f"{self.name}-embedder"

    @property
    def limits(self) -> ServeConfig:
        """The ``serve`` section of the configuration."""
        return self.config.serve

    @classmethod
    def of(cls, runtime: Runtime, adapter: Adapter, keys: Keys) -> "Served":
        """The parts for an open runtime and the adapter of its model. Opening and closing those is the caller's."""
        config = runtime.config
        name = config.serve.name or config.model.path.rstrip("/").rpartition("/")[2]
        meter = ServeMeter()
        return cls(runtime, adapter, config, keys, name, Gate(config.model.rows + config.serve.queue), meter)
