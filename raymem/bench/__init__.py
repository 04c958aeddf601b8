"""What raymem costs and promises, in figures: contests with peers in the same run. The command is `raymem bench`."""
