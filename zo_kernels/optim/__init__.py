"""Zeroth-order steps: what to evaluate, and what the update is made of. Arithmetic on weights belongs to `zo_kernels.ops`."""

from zo_kernels.optim.anchor import Anchor
from zo_kernels.optim.blocks import Blocks
from zo_kernels.optim.check import Finding, Report, check
from zo_kernels.optim.clip import QuantileClip
from zo_kernels.optim.directions import Dense, InputSubspace, InverseRoot, LayerScale, LowRank, MagnitudeSparse, RandomSparse
from zo_kernels.optim.estimators import ForwardGradient, OneSided, Shaped, ThreePoint, TwoSided
from zo_kernels.optim.findings import ZOWarning
from zo_kernels.optim.inputs import input_factors
from zo_kernels.optim.methods import (
    FZOO,
    LOZO,
    BlockwiseZO,
    DiZO,
    ForwardGrad,
    HiZOO,
    HybridZO,
    MeZOStep,
    SparseMeZO,
    ZOAdam,
    ZOConservative,
    ZOMomentum,
    ZOSignSGD,
)  # fmt: skip
from zo_kernels.optim.perturbed import perturbed
from zo_kernels.optim.projection import Projection
from zo_kernels.optim.rules import SGD, Adam, Conservative, HessianDiagonal, LowRankMomentum, Momentum, Sign
from zo_kernels.optim.shaping import group_relative, ranked, z_scored
from zo_kernels.optim.step import ZOStep
from zo_kernels.optim.unit import ScaleFree
from zo_kernels.optim.workers import WorkerError, Workers

METHODS = (
    MeZOStep,
    ZOSignSGD,
    ZOMomentum,
    ZOAdam,
    ZOConservative,
    ForwardGrad,
    HybridZO,
    BlockwiseZO,
    SparseMeZO,
    HiZOO,
    DiZO,
    LOZO,
    FZOO,
)
__all__ = [
    "FZOO",
    "LOZO",
    "METHODS",
    "SGD",
    "Adam",
    "Anchor",
    "Blocks",
    "BlockwiseZO",
    "Conservative",
    "Dense",
    "DiZO",
    "Finding",
    "ForwardGrad",
    "ForwardGradient",
    "HessianDiagonal",
    "HiZOO",
    "HybridZO",
    "InputSubspace",
    "InverseRoot",
    "LayerScale",
    "LowRank",
    "LowRankMomentum",
    "MagnitudeSparse",
    "MeZOStep",
    "Momentum",
    "OneSided",
    "Projection",
    "QuantileClip",
    "RandomSparse",
    "Report",
    "ScaleFree",
    "Shaped",
    "Sign",
    "SparseMeZO",
    "ThreePoint",
    "TwoSided",
    "WorkerError",
    "Workers",
    "ZOAdam",
    "ZOConservative",
    "ZOMomentum",
    "ZOSignSGD",
    "ZOStep",
    "ZOWarning",
    "check",
    "group_relative",
    "input_factors",
    "perturbed",
    "ranked",
    "z_scored",
]
