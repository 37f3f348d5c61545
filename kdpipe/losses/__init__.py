"""Distillation losses: one file per method, a pure function with the formula, then a thin module.

A module's `forward(student, teacher, labels, indices, epoch)` takes the `Outputs` of both networks (`teacher` is None
where none was built), the labels, int64 [N] (float [N, classes] of mixed images), the images' positions in the data
set, int64 [N], and the epoch, counted from 1; it returns the named parts, scalars, of which `loss` is minimised.
`uses_teacher` says whether it asks for a teacher (at `alpha` 0 none is built all the same), `roles` what it asks of
both networks beside logits. Most modules are a `Distillation` and define its `term` alone.
"""

from kdpipe.losses.attention import Attention, attention
from kdpipe.losses.correlation import Correlation, correlation
from kdpipe.losses.crd import CRD, crd
from kdpipe.losses.cross_entropy import CrossEntropy, cross_entropy
from kdpipe.losses.dist import DIST, dist
from kdpipe.losses.dkd import DKD, dkd
from kdpipe.losses.hint import Hint, hint
from kdpipe.losses.kd import KD, kd
from kdpipe.losses.kd_tutorial import KDTutorial, kd_tutorial
from kdpipe.losses.label_smoothing import LabelSmoothing, label_smoothing
from kdpipe.losses.logit_mse import LogitMSE, logit_mse
from kdpipe.losses.mutual import Mutual
from kdpipe.losses.pkt import PKT, pkt
from kdpipe.losses.reviewkd import ReviewKD, reviewkd
from kdpipe.losses.rkd import RKD, rkd, rkd_angle, rkd_distance
from kdpipe.losses.similarity import Similarity, similarity
from kdpipe.losses.vid import VID, vid

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "PKT",
    "RKD",
    "VID",
    "Attention",
    "Correlation",
    "CrossEntropy",
    "Hint",
    "KDTutorial",
    "LabelSmoothing",
    "LogitMSE",
    "Mutual",
    "ReviewKD",
    "Similarity",
    "attention",
    "correlation",
    "crd",
    "cross_entropy",
    "dist",
    "dkd",
    "hint",
    "kd",
    "kd_tutorial",
    "label_smoothing",
    "logit_mse",
    "pkt",
    "reviewkd",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "similarity",
    "vid",
]
