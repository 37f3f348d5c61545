"""`python -m kdpipe.compare`: the finished runs of an experiment side by side, and whether distillation helped.

cells → comparison (with statistics) → formats and pictures. A distilled student is held against the same student alone,
seed by seed, and image by image (`answers`); `worth` knows what networks cost, `published` what papers report.
"""
