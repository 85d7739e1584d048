"""Methods that are no weightings, and the catalogue of all methods."""
