"""Drive the training of a run: one agent's step, all agents in one process, or each agent in its own."""
