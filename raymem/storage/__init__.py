"""LanceDB: the catalog, journals, snapshots, histories and erasures of banks."""
