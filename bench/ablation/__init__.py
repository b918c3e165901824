"""`python -m mgrpo.bench.ablation`: measures what training the agents together is worth."""
