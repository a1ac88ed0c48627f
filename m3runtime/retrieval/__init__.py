"""Retrieval: a text becomes ids and scores, by an embedder and an index."""
