"""Hardware, randomness, interruption, files, progress and timing: nothing here knows of distillation."""
