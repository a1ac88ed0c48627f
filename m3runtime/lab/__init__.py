"""Experiments: evaluation and benchmarks. Only `m3runtime.cli` imports this package."""
