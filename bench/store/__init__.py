"""`mgrpo bench store`: times the store under 1 to 32 workers, and one step of a decoupled trainer."""
