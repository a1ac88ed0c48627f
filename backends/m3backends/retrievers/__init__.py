"""Retrievers of other libraries over an open runtime: LangChain and LlamaIndex."""
