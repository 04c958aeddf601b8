"""Banks as files: one zip, written and read with every field checked."""
