"""The HTTP API: an OpenAI-compatible server over a runtime and an engine. Needs ``m3runtime[serve]``."""
