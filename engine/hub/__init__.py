"""Get models and data sets from a hub, and say what to do where that fails."""
