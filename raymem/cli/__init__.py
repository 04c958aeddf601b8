"""The `raymem` command."""
