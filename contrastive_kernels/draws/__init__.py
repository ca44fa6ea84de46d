"""Random numbers that are part of a definition: every backend and every panel draws the same."""
