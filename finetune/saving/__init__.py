"""What a run leaves on disk: checkpoints that are whole or invisible, going on from them, the final folder."""
