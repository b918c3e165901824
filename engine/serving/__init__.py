"""The side of a vLLM server: how it is started and guarded, and how it takes new weights."""
