"""Whole fields from sparse pixels without a network: what a model has to beat."""

import numpy as np

from nfhelpers.images import grid_coords, to_image, to_unit

METHODS = ("linear", "cubic", "thin plate", "biharmonic")
"""Delaunay triangles; Clough-Tocher on them; spline through all points; inpainting of the observed grid."""
RIDGE = 1e-4  # added to the variances of the observed pixels, as a part of the mean variance of a pixel


def fill(method, input_coords, input_values, height, width, observed_size=None):
    """Fields (N, height, width, 3) float32 in [0, 1] of observed pixels, by one of `METHODS`.

    input_coords (N, Ni, 2) and input_values (N, Ni, 3), in [-1, 1], are of pixel centres of a grid of
    observed_size (height, width), which only "biharmonic" asks for; None: the size of the fields. Outside the
    convex hull "linear" and "cubic" take the nearest point.
    """
    coords = np.asarray(input_coords, dtype=np.float64)
    values = np.asarray(to_image(input_values), dtype=np.float64)
    if method == "biharmonic":
        grid = observed_size or (height, width)
        filled = [_inpaint(*pair, *grid) for pair in zip(coords, values, strict=True)]
        return resize(np.stack(filled), height, width).astype(np.float32)
    query = grid_coords(height, width).numpy().astype(np.float64)  # (h*w, 2)
    made = np.stack([_interpolate(method, *pair, query) for pair in zip(coords, values, strict=True)])
    return made.reshape(-1, height, width, 3).clip(0, 1).astype(np.float32)


def _interpolate(method, coords, values, query):
    from scipy import interpolate

    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(METHODS)}")
    if method == "thin plate":
        return interpolate.RBFInterpolator(coords, values, kernel="thin_plate_spline")(query)
    kind = interpolate.LinearNDInterpolator if method == "linear" else interpolate.CloughTocher2DInterpolator
    field = kind(coords, values)(query)  # (h*w, 3), NaN outside the convex hull
    nearest = interpolate.NearestNDInterpolator(coords, values)
    return np.where(np.isnan(field), nearest(query), field)


def _inpaint(coords, values, height, width):
    from skimage.restoration import inpaint_biharmonic

    position = coords * [width, height] - 0.5  # (Ni, 2), whole numbers on the grid
    column, row = position.round().astype(int).T
    if np.abs(position - position.round()).max() > 1e-3 or column.max() >= width or row.max() >= height:
        raise ValueError(f"the points are no pixel centres of {height} x {width}; pass their observed_size")
    field, missing = np.zeros((height, width, 3)), np.ones((height, width), dtype=bool)
    field[row, column], missing[row, column] = values, False
    return inpaint_biharmonic(field, missing, channel_axis=-1).clip(0, 1) if missing.any() else field


def resize(fields, height, width, order=3):
    """Fields (N, H, W, 3) in [0, 1] resampled with aligned pixel centres; order 1 bilinear, 3 bicubic."""
    from skimage.transform import resize

    if fields.shape[1:3] == (height, width):
        return fields
    shrinks = height < fields.shape[1] or width < fields.shape[2]
    options = {"order": order, "mode": "edge", "anti_aliasing": shrinks}
    return np.stack([resize(field, (height, width), **options) for field in fields]).clip(0, 1)


class Wiener:
    """The best linear estimate of unobserved pixels u from observed ones o (linear MMSE, simple kriging).

        v_u = m + C_uo (C_oo + ridge)^-1 (v_o - m)

    with the mean colour m and a covariance C that depends on the offset of two pixels alone, all channels
    jointly, of training images (M, H, W, 3) mirrored at their borders: few images suffice, and it is positive
    definite. A network that does not beat it has learned no more than second moments. Source: Wiener, 1949.
    """

    def __init__(self, train_images):
        from scipy.fft import dctn

        images = to_unit(train_images)
        self.height, self.width = images.shape[1:3]
        self.mean = images.mean(axis=(0, 1, 2), dtype=np.float64)  # (3,)
        spectra = dctn(images - self.mean, axes=(1, 2), norm="ortho")  # (M, H, W, 3)
        power = np.einsum("mhwi,mhwj->hwij", spectra, spectra) / len(images)  # (H, W, 3, 3)
        sides = images.shape[1:3]
        cosines = [np.cos(np.pi * np.outer(np.arange(n + 1), np.arange(n)) / n) / n for n in sides]
        self.covariance = np.einsum("yh,xw,hwij->yxij", *cosines, power, optimize=True)  # (H+1, W+1, 3, 3)
        lags = [np.abs(np.fft.fftfreq(2 * n, 1 / (2 * n))).astype(int) for n in sides]
        self.kernel = np.fft.rfft2(self.covariance[np.ix_(*lags)], axes=(0, 1))  # (2H, W+1, 3, 3)

    def fill(self, observed, size=None):
        """Fields (N, H, W, 3) of an `evaluate.Observed`, or resampled to (N, size, size, 3)."""
        fields = np.stack([self._fill(*p) for p in zip(observed.images, observed.mask, strict=True)])
        shape = (self.height, self.width) if size is None else (size, size)
        return resize(fields, *shape).astype(np.float32)

    def _fill(self, image, mask):
        from scipy.linalg import solve

        row, column = mask.nonzero()  # (Ni,) each
        lags = [np.abs(index[:, None] - index) for index in (row, column)]  # (Ni, Ni) each
        among = self.covariance[tuple(lags)]  # (Ni, Ni, 3, 3)
        among = among.transpose(0, 2, 1, 3).reshape(3 * len(row), -1)  # (3 Ni, 3 Ni)
        among[np.diag_indices_from(among)] += RIDGE * np.trace(self.covariance[0, 0]) / 3 + 1e-12
        # Zero-padded to twice the size, the circular convolution is the sum over the observed pixels.
        weights = np.zeros((2 * self.height, 2 * self.width, 3))
        weights[row, column] = solve(among, (image[mask] - self.mean).ravel(), assume_a="pos").reshape(-1, 3)
        spread = np.einsum("yxij,yxj->yxi", self.kernel, np.fft.rfft2(weights, axes=(0, 1)))
        spread = np.fft.irfft2(spread, s=weights.shape[:2], axes=(0, 1))[: self.height, : self.width]
        return np.where(mask[..., None], image, (self.mean + spread).clip(0, 1))
