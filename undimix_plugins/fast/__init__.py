"""The fast path: the numbers of the plain reference (`loss.py`, `components.py`) in blocks of anchors."""
