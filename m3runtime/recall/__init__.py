"""Recall: ids become decoded memories on the device."""
