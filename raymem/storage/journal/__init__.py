"""The ordered record of accepted rows: a table for each bank, and the log that small writes share."""
