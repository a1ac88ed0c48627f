"""Encoders on a Ray cluster."""
