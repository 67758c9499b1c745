"""The run folder: who owns it, its record, and the checkpoints in it."""
