"""Metrics of a runtime: counters, latencies, a timeline and the Prometheus endpoint."""
