"""`python -m mgrpo.bench.ablation`: what training the agents together is worth."""
