"""What raymem costs and promises, in figures, beside peers that are measured in the same run: `raymem bench`."""
