"""Explicit memories in vLLM: a KV connector, and an engine. Imports neither transformers nor the adapter."""
