"""How a node comes by the weights of its layers: from a folder it sees, its own disk, or the coordinator."""
