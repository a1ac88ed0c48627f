"""Devices, streams, threads and copies: where the runtime computes."""
