"""Wrap the operating system: processes, signals, process groups, user imports, statistics."""
