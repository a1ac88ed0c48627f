"""`RemoteAdapter`: a model that a server of vLLM serves, as the server and the commands of m3 know models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from m3model.loading.models import configuration_of, generation_of, tokenizer_of
from m3model.remote.core import RemoteCore
from m3model.remote.server import VllmServer
from m3model.vllm.front import FrontAdapter
from m3runtime.errors import BankMismatchError, ConfigError
from m3runtime.runtime import Runtime

if TYPE_CHECKING:
    from m3runtime.stream import Recaller


class RemoteAdapter(FrontAdapter):
    """vLLM at a URL, over the bank of an open runtime: the server has the same one, or a copy of it.

    Here is the tokenizer alone. The server recalls, decodes, and says what it reads.
    """

    def __init__(self, runtime: Runtime, url: str, model: str | None = None) -> None:
        """``model`` is the name that the server serves it by; default: its first one. Raises as `VllmServer.find`."""
        server = VllmServer.find(url, model)
        path, ours = runtime.config.model.path, runtime.bank.manifest.stamp.bank
        if server.bank != ours:
            raise BankMismatchError(f"{runtime.bank.path}: {server.url} reads another bank ({server.bank}, not {ours})")
        tokenizer, config = tokenizer_of(path), configuration_of(path)
        super().__init__(
            runtime,
            RemoteCore(server, runtime),
            tokenizer,
            stop=_ids(generation_of(path).eos_token_id) | _ids(tokenizer.eos_token_id),
            length=server.length,
            vocabulary=config.get_text_config().vocab_size,
        )

    @classmethod
    def over(cls, runtime: "Recaller", device: torch.device, options: Mapping[str, Any]) -> Self:  # noqa: ARG003
        """Serve over the server at ``url``; see `Adapter.over`. Raises `ConfigError` for other options than its own."""
        if "url" not in options:
            raise ConfigError("--engine url: say where, with --engine-set url=http://127.0.0.1:8000/v1")
        if unknown := sorted({*options} - {"url", "model"}):
            raise ConfigError(f"--engine url has no option {unknown[0]}; the server's are given where it is started")
        return cls(cast(Runtime, runtime), **options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bank's memories; the server has its own."""
        return cast(torch.dtype, getattr(torch, self.spec.dtype))


def _ids(found: int | list[int] | None) -> frozenset[int]:
    return frozenset([found] if isinstance(found, int) else found or ())
