"""A bank in parts: where streams live, answers put together, streams moved."""
