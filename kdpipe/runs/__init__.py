"""A run's folder: names of files and tags, journal, claim; and the URI of the MLflow store."""
