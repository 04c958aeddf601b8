"""One bank in its owner: the replica, its writes in order, and what changes it as a whole."""
