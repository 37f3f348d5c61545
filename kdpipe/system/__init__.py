"""Hardware, randomness, interruption, files, progress and timing; knows nothing of distillation."""
