"""What is trained in runs: pretraining and each task with labels, with its job, its judge and its pictures."""
