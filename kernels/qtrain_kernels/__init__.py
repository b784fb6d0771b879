"""Low-precision kernels of qtrain, one file an op. Nothing is imported, registered or probed here."""
