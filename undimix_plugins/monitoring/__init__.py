"""Tools to watch a training: importance weights, statistics, explanations; schedules of hardness and temperature."""
