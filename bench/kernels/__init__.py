"""`mgrpo bench kernels`: the loss and log-prob kernels against their floor and their peers."""
