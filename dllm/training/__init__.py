"""Training: the arguments, the Trainer, optimisers, and the two jobs, pretraining and supervised fine-tuning."""
