"""Evaluations of answers from memories, for ``m3 eval``."""
