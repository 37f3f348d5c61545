"""Sweeps: grids and chains of runs."""
