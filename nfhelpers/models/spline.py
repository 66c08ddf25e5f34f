"""Thin-plate splines of batches of point sets: the smoothest surface through the observed pixels.

Glossary
    b  batch
    q  query points
    i  observed (input) points
    c  channels
"""

import torch
from torch.nn import functional as F

from nfhelpers.models.layers import squared_distances

RIDGE = 1e-8
"""Added to the diagonal of the system, whose entries are of order 1 for points of the unit square."""

BASIS_AT_ONCE = 2**18
"""Basis functions of a sample evaluated together: those of all queries, (Q, I), are far beyond a cache."""


def thin_plate_spline(
    query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
) -> torch.Tensor:
    """Interpolate scattered values by thin-plate splines: one linear solve for the whole batch.

        s(p) = sum over i of w_i phi(|p - p_i|) + c_0 + c_1 x + c_2 y        phi(r) = r^2 log r
        [ Phi + ridge   P     ] [w]   [values]
        [ P^T          -ridge ] [c] = [  0   ]      the lower ridge on c_1 and c_2 only

    Of all surfaces through the values it bends least. The ridge decides what the points leave open: points
    that coincide are averaged, and across points on a line, or a single one, the surface is level. Elsewhere
    it changes less than 1e-4 of the values' range. The system is solved in float64 whatever the dtype, under
    autocast, too: its condition grows with the fourth power of the points' density.

    query_coords (B, Q, 2) and input_coords (B, I, 2) in [0, 1], input_values (B, I, C), Q and I at least 1.
    Returns (B, Q, C) in the dtype of the values. Time is O(I^3 + Q I) a sample; memory O(I^2), and O(Q I)
    where the values require a gradient.

    Sources: Duchon, "Splines minimizing rotation-invariant semi-norms in Sobolev spaces", 1977; Wahba,
    "Spline Models for Observational Data", 1990. `scipy.interpolate.RBFInterpolator` is the same without a
    batch.
    """
    points = input_coords.double()  # (B, I, 2)
    affine = _affine(points)  # (B, I, 3)
    like = dict(dtype=points.dtype, device=points.device)
    bending = _radial(points, points) + RIDGE * torch.eye(points.shape[1], **like)  # (B, I, I)
    slopes = RIDGE * F.pad(torch.eye(2, **like), (1, 0, 1, 0)).expand(len(points), 3, 3)
    system = torch.cat(
        [torch.cat([bending, affine], dim=-1), torch.cat([affine.mT, -slopes], dim=-1)], dim=1
    )  # (B, I+3, I+3)
    # The ridge keeps the system regular: no wait for the device to say so.
    weights, _ = torch.linalg.solve_ex(system, F.pad(input_values.double(), (0, 0, 0, 3)))  # (B, I+3, C)
    parts = [
        torch.cat([_radial(part, points), _affine(part)], dim=-1) @ weights  # (B, q, C)
        for part in query_coords.double().split(max(1, BASIS_AT_ONCE // points.shape[1]), dim=1)
    ]
    return torch.cat(parts, dim=1).to(input_values.dtype)  # (B, Q, C)


def _radial(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    distance2 = squared_distances(p, q)
    # xlogy(distance2, distance2), which is slower: 0 where points coincide.
    return 0.5 * distance2 * distance2.clamp_min(torch.finfo(distance2.dtype).tiny).log()  # (B, P, Q)


def _affine(p: torch.Tensor) -> torch.Tensor:
    return F.pad(p, (1, 0), value=1.0)  # (B, P, 3): 1, x, y
