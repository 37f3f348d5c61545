"""What a trained network is worth: exam, metrics, cost, figures, and the report of one run."""
