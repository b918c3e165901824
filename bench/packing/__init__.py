"""`mgrpo bench packing`: the packer against its peers from PyPI."""
