"""Plug-ins: names in the configuration become classes, and their options constructor arguments."""
