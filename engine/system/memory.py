"""Say how much memory this machine gives to a process, and how much the process has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def machine_memory() -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and those of them that are free now.

    They are the machine's or, if that is less, those of a control group around the process, as containers have one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _control_groups():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Return the most bytes of memory that this program has had.

    Unlike `ru_maxrss`, which a new program begins with from the process that it replaces, and so from its parent.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _control_groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each control group around this process that has a limit; version 2, then 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _upwards(CGROUPS, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _upwards(CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _upwards(root: Path, path: str, limit: str, used: str) -> Iterator[tuple[int, int]]:
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        found = _number(group / limit)
        if found is not None:
            yield found, _number(group / used) or 0


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or it says that there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
