"""Thin-plate splines of batches of point sets: the smoothest surface through the observed pixels."""

import torch
from torch.nn import functional as F

from nfhelpers.models.layers import solve_positive, squared_distances

RIDGE = 1e-8  # added to the diagonal of the system, whose entries are of order 1
SHIFT = 2.0  # k of `thin_plate_spline`: from about 0.7 on, S is positive definite in the unit square
LEVEL = 1e-13  # mean squared distance from a line below which points are on it
BASIS_AT_ONCE = 2**18, 2**25  # basis functions: of a sample what a CPU's cache holds; of a batch on a GPU


def thin_plate_spline(
    query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
) -> torch.Tensor:
    """Interpolate scattered values (B, I, C) at (B, I, 2) by thin-plate splines -> (B, Q, C) at (B, Q, 2).

        s(p) = sum over i of w_i phi(|p - p_i|) + c_0 + c_1 x + c_2 y        phi(r) = r^2 log r
        (Phi + ridge) w + P c = values        P^T w = 0

    The ridge averages points that coincide. S = Phi + ridge + k P P^T is positive definite, so that Cholesky
    factors solve (P^T S^-1 P) c = P^T S^-1 values, w = S^-1 (values - P c). Across points on a line the
    surface is level: N adds (slope)^2 where P has no say. Float64, time O(I^3 + Q I) a sample. On a CPU and
    without a batch it is `scipy.interpolate.RBFInterpolator`. Source: Wahba 1990.
    """
    points, values = input_coords.double(), input_values.double()
    P = _affine(points)  # (B, I, 3)
    S = _radial(points, points) + SHIFT * P @ P.mT  # (B, I, I)
    S.diagonal(dim1=1, dim2=2).add_(RIDGE)
    solved_P, solved_values = solve_positive(S, torch.cat([P, values], dim=-1)).tensor_split([3], dim=-1)
    slopes = (torch.arange(3, device=P.device) > 0).to(P.dtype).diag().expand(len(P), 3, 3)
    level = LEVEL * points.shape[1] * slopes
    N = level @ solve_positive(P.mT @ P + level, slopes)  # 1 for slopes across a line, else next to 0
    c = solve_positive(P.mT @ solved_P + N, P.mT @ solved_values)  # (B, 3, C)
    w = solved_values - solved_P @ c  # (B, I, C)
    at_once = BASIS_AT_ONCE[1] // len(points) if points.is_cuda else BASIS_AT_ONCE[0]
    parts = query_coords.double().split(max(1, at_once // points.shape[1]), dim=1)
    parts = [_radial(part, points) @ w + _affine(part) @ c for part in parts]  # (B, q, C) each
    return torch.cat(parts, dim=1).to(input_values.dtype)  # (B, Q, C)


def _radial(p, q):
    distance2 = squared_distances(p, q)
    # xlogy(distance2, distance2), which is slower: 0 where points coincide.
    return 0.5 * distance2 * distance2.clamp_min(torch.finfo(distance2.dtype).tiny).log()  # (B, P, Q)


def _affine(p):
    return F.pad(p - 0.5, (1, 0), value=1.0)  # (B, P, 3): 1, x, y
