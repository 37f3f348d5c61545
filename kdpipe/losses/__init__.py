"""Distillation losses: one file per method, a pure function with the formula, then a thin module.

A module derives from `WeightedLoss` (ce_weight·CE + weight·term) or `AlphaLoss` ((1 − alpha)·CE + alpha·term), has a
`@checked` constructor with its parameters, and defines `term`. `Loss`, the base of all, documents the rest.
"""

from kdpipe.losses.attention import Attention, attention
from kdpipe.losses.base import AlphaLoss, CombinedLoss, Loss, WeightedLoss
from kdpipe.losses.bce import BCE, bce
from kdpipe.losses.correlation import Correlation, correlation
from kdpipe.losses.crd import CRD, crd
from kdpipe.losses.cross_entropy import CrossEntropy, cross_entropy
from kdpipe.losses.dist import DIST, dist
from kdpipe.losses.dkd import DKD, dkd
from kdpipe.losses.hard import Hard, hard
from kdpipe.losses.hidden_cosine import HiddenCosine, hidden_cosine
from kdpipe.losses.hint import Hint, hint
from kdpipe.losses.kd import KD, kd
from kdpipe.losses.kd_tutorial import KDTutorial, kd_tutorial
from kdpipe.losses.label_smoothing import LabelSmoothing, label_smoothing
from kdpipe.losses.logit_mse import LogitMSE, logit_mse
from kdpipe.losses.map_mse import MapMSE
from kdpipe.losses.mutual import Mutual
from kdpipe.losses.pkt import PKT, pkt
from kdpipe.losses.reviewkd import ReviewKD, reviewkd
from kdpipe.losses.rkd import RKD, rkd, rkd_angle, rkd_distance
from kdpipe.losses.similarity import Similarity, similarity
from kdpipe.losses.vid import VID, vid
