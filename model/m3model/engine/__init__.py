"""Decoding with memories: sessions, prompts, sampling, scoring."""
