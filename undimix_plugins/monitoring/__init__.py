"""Tools to watch a training: importance weights, statistics, explanations, and a warm-up of the hardness."""
