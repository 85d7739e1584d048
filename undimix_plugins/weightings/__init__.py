"""How much each negative counts: a class per method."""
