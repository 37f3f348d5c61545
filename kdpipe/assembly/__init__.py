"""From settings to objects: each `build_…` takes a part of the settings, and errors name the key; and a run's tags."""
