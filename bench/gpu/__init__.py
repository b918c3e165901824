"""The first contact with a GPU (`bench/gpu.sh`): each path of it once against its reference, then its speed."""
