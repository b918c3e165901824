"""`mgrpo bench step`: times one whole optimisation step, one elimination after another."""
