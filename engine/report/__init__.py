"""Show a run: live table, metrics of all processes merged, curves, summary, transcripts."""
