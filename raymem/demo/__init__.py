"""The parts of `raymem demo`: the engine and the gateway that it starts, and the agent that reads."""
