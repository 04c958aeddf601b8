"""`python -m raymem.cli` is the `raymem` command."""

from raymem.cli import main

main()
