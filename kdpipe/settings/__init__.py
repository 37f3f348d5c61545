"""What a config means: typed values and their errors, identity, names, and which components are accepted."""
