"""Zeroth-order steps: what to evaluate, and what the update is made of. Arithmetic on weights belongs to `zo_kernels.ops`."""

from zo_kernels.optim.blocks import Blocks
from zo_kernels.optim.directions import Dense, InverseRoot, LayerScale, LowRank, MagnitudeSparse, RandomSparse
from zo_kernels.optim.estimators import ForwardGradient, OneSided, ThreePoint, TwoSided
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
from zo_kernels.optim.projection import Projection
from zo_kernels.optim.rules import SGD, Adam, Conservative, HessianDiagonal, Momentum, Sign
from zo_kernels.optim.step import QuantileClip, ZOStep

METHODS = (
    MeZOStep, ZOSignSGD, ZOMomentum, ZOAdam, ZOConservative, ForwardGrad, HybridZO, BlockwiseZO, SparseMeZO, HiZOO, DiZO, LOZO, FZOO,
)  # fmt: skip
PARTS = (
    TwoSided, OneSided, ThreePoint, ForwardGradient, SGD, Sign, Conservative, Momentum, Adam, HessianDiagonal, Dense, RandomSparse,
    MagnitudeSparse, LayerScale, InverseRoot, LowRank, Blocks, Projection, QuantileClip,
)  # fmt: skip
__all__ = ["METHODS", "PARTS", "ZOStep", *(m.__name__ for m in METHODS), *(p.__name__ for p in PARTS if p is not Dense), "Dense"]
