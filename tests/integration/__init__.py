"""Real processes, real gRPC, real mDNS, tiny real models."""
