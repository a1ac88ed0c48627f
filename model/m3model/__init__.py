"""Adapters for m3runtime: what knows about neural networks."""
