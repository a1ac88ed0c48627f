"""Models from folders, hub names and GGUF files; their shape and fingerprint."""
