"""The contract between a language model and the runtime."""
