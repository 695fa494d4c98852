"""What lies on disk: indexes, byte locations, manifests. Reads no pickle as code and imports no torch."""
