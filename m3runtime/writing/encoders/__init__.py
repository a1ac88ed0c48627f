"""Encoders: processes with a model each, on this machine or on others, that encode what one writer commits."""
