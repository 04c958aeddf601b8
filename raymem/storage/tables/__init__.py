"""Tables of LanceDB, and what makes a commit to them durable and exclusive."""
