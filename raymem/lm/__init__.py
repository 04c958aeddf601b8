"""Memory in front of a frozen language model: loading, mixing, gates, evaluation."""
