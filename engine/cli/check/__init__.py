"""Say before a run whether it can go well: play stubbed episodes in the user's environment, predict the memory."""
