"""Play episodes between agents and record them; decide which task comes when."""
