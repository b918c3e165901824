"""The Triton kernels, imported only when a tensor lies on a GPU (or under the interpreter in tests)."""
