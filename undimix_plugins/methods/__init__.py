"""Methods that are not weightings, and the catalogue of all methods."""
