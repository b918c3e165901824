"""mgrpo's engine: per-agent training of multi-agent LLM systems by M-GRPO (arXiv 2511.13288)."""
