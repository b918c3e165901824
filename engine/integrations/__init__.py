"""Other trainers with our loss, our compaction and our packing under their own step; rollouts that they recorded.

Nothing of ours imports these.
"""
