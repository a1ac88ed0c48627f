"""A tier in Valkey or Redis, shared by many machines."""
