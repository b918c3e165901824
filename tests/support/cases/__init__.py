"""Hold what tests of several files share, a module a subject."""
