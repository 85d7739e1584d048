"""What a weighted loss costs.

speed        the time of the losses and of whole training steps, relative to the plain loss
scaling      time and memory by batch size, width and processes
monitoring   the time of the statistics of the negatives
"""
