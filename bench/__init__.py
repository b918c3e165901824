"""Benchmarks: `mgrpo bench kernels`, `mgrpo bench packing`. Nothing imports them but each other and that command."""
