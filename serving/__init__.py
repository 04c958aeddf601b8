"""The HTTP gateway, the Ray Serve deployment and the vLLM plugin. Imported as `raymem.serving` only."""

if __name__ != "raymem.serving":
    raise ImportError(f"imported as {__name__!r}, where every class would exist twice: use `import raymem.serving`")
