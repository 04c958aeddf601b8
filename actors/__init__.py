"""Ray actors: shards, the directory, migration. Imported as `raymem.actors` only."""

if __name__ != "raymem.actors":
    raise ImportError(f"imported as {__name__!r}, where every class would exist twice: use `import raymem.actors`")
