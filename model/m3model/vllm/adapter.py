"""`VllmAdapter`: a model that vLLM serves in this process, as the server and the commands of m3 know models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from m3model.vllm import compat, hosting
from m3model.vllm.core import LocalCore
from m3model.vllm.front import FrontAdapter
from m3model.vllm.settings import checkpoint_of
from m3runtime.runtime import Runtime

if TYPE_CHECKING:
    from m3runtime.stream import Recaller


class VllmAdapter(FrontAdapter):
    """vLLM in this process, over the bank of an open runtime. Memories are written by the bank's own adapter."""

    def __init__(self, runtime: Runtime, options: Mapping[str, Any]) -> None:
        """``options`` are arguments of vLLM's ``EngineArgs``, and what `Settings` has beside the configuration."""
        config, model = runtime.config, checkpoint_of(runtime.config)
        ours = {name: options[name] for name in ("slots", "placeholder", "cache", "check_weights") if name in options}
        theirs = {name: value for name, value in options.items() if name not in ours}
        theirs = {"max_num_seqs": config.model.rows, "dtype": config.model.dtype, **theirs}
        extra = {"config": config.model_dump(mode="json"), "hosted": True, **ours}
        core = LocalCore(lambda: hosting.open_engine(model, theirs, extra), runtime)
        self._shape = compat.shape_of(core.config)
        super().__init__(
            runtime,
            core,
            compat.tokenizer_of(core.config),
            stop=hosting.stop_tokens(core.config),
            length=self._shape.length,
            vocabulary=hosting.vocabulary(core.config),
        )

    @classmethod
    def over(cls, runtime: "Recaller", device: torch.device, options: Mapping[str, Any]) -> Self:  # noqa: ARG003
        """Serve the model of a runtime's configuration; see `Adapter.over`."""
        return cls(cast(Runtime, runtime), options)

    @property
    def dtype(self) -> torch.dtype:
        """See `Adapter.dtype`."""
        return self._shape.dtype
