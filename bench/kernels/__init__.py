"""`mgrpo bench kernels`: compares the loss and log-prob kernels with their floor and their peers."""
