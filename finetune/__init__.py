"""Continued pretraining and instruction tuning: documents to batches, the loss, the loop, checkpoints."""
