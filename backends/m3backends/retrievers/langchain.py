"""`MemoryRetriever`: a retriever of LangChain over an open runtime (extra ``langchain``)."""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import SkipValidation

from m3backends.retrievers.passages import passages
from m3runtime.runtime import Runtime


class MemoryRetriever(BaseRetriever):
    """Finds the references that the runtime would recall. No model is run. Thread-safe, as the runtime is."""

    runtime: SkipValidation[Runtime]
    """Stays the caller's to close."""
    k: int | None = None
    """So many whatever their scores; None: those that a recall would choose."""
    where: dict[str, Any] | None = None
    """Only those with such metadata: see ``recall.where``."""

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's own
    ) -> list[Document]:
        """Documents, best first; their metadata is that of `m3backends.retrievers.passages.Passage`."""
        found = passages(self.runtime, query, self.k, self.where)
        return [Document(id=str(one.id), page_content=one.text, metadata=one.metadata) for one in found]
