"""What one watches while a model trains: importance weights, statistics, explanations, a warm-up of the hardness."""
