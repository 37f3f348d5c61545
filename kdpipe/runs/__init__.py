"""A run's folder: file names and tags, journal, claim, and where the MLflow store is."""
