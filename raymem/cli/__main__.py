"""`python -m raymem.cli` is the `raymem` command."""

from raymem.cli.app import main

main()
