"""The ground floor: what one panel, a block of the score matrix, is."""
