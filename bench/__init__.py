"""Benchmarks: `mgrpo bench kernels|packing|step|rollout|store`. Only that command and the benchmarks import them."""
