"""`MemoryRetriever`: a retriever of LlamaIndex over an open runtime (extra ``llama-index``)."""

from collections.abc import Mapping
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from m3backends.retrievers.passages import passages
from m3runtime.runtime import Runtime


class MemoryRetriever(BaseRetriever):
    """Finds the references that the runtime would recall. No model is run. Thread-safe, as the runtime is."""

    def __init__(self, runtime: Runtime, *, k: int | None = None, where: Mapping[str, Any] | None = None) -> None:
        """``k``: so many whatever their scores. ``where``: only those with such metadata, see ``recall.where``."""
        super().__init__()
        self._runtime = runtime
        self._k = k
        self._where = where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Nodes with scores, best first; their metadata is that of `m3backends.retrievers.passages.Passage`."""
        found = passages(self._runtime, query_bundle.query_str, self._k, self._where)
        nodes = [TextNode(id_=str(one.id), text=one.text, metadata=one.metadata) for one in found]
        return [NodeWithScore(node=node, score=one.score) for node, one in zip(nodes, found, strict=True)]
