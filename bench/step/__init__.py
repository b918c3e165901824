"""`mgrpo bench step`: one whole optimisation step, one elimination after another."""
