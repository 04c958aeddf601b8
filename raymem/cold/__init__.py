"""Cold memory: what survives every process, in LanceDB and nowhere else."""
