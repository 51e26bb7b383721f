"""Fast paths, each beside the plain-PyTorch twin that it is tested against."""
