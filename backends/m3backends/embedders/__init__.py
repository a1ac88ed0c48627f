"""Embedders of sentence-transformers and FlagEmbedding."""
