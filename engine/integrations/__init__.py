"""Other trainers with our loss, our compaction and our packing under their own step. Nothing of ours imports these."""
