"""Many banks in one process: ownership, memory, handover, maintenance."""
