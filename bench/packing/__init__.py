"""`mgrpo bench packing`: compares the packer with its peers from PyPI."""
