"""Benchmarks: each compares with a named baseline in the same run, by turns, and prints medians with their spread."""
