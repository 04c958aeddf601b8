"""Many banks in one process: ownership, memory, moving, upkeep."""
