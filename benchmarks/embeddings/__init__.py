"""How good the trained embeddings are.

vision, text, graphs   the trainings and evaluations of each modality, as commands
protocol               which trials there are: tuning, test, exploratory, flatness
trials                 what one trial is
sweep                  runs the trials that have no result
results                the results on disk
tables                 the tables and plots in docs/results.md
command_line, files    what these share
"""
