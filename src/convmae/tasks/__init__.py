"""What is a run's own besides its course: pretraining, and each task with labels: its job, its judge, its pictures."""
