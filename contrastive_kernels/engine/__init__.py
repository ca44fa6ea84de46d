"""The streaming driver: walks panels of the score matrix. It names no loss."""
