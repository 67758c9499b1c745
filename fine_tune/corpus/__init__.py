"""What makes a corpus clean: pure functions over texts, no torch."""
