"""Send the numbers and some episodes of a run to the tools in which people watch them, each in a process of its own."""
