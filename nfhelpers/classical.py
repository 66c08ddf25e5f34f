"""Whole fields from sparse pixels without a network: what a model has to beat."""

import numpy as np
import scipy

from nfhelpers.images import grid_coords, to_unit

METHODS = ("linear", "cubic", "thin plate", "biharmonic")
RIDGE = 1e-4  # added to the variances of the observed pixels, as a part of the mean variance of a pixel


def fill(method, observed, size=None):
    """Fields (N, H, W, 3) float32 in [0, 1] of an `evaluate.Observed`, its pixels kept; or another size."""
    from skimage.restoration import inpaint_biharmonic

    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(METHODS)}")
    own = observed.mask.shape[1:]
    shape = (size, size) if size else own
    query, fields = grid_coords(*shape).double().numpy(), []  # (h*w, 2)
    for coords, image, mask in zip(observed.input_coords, observed.images, observed.mask, strict=True):
        points = coords.double().numpy(), image[mask].astype(np.float64)  # (Ni, 2), (Ni, 3)
        if method == "biharmonic":
            field = inpaint_biharmonic(image.astype(np.float64), ~mask, channel_axis=-1)  # (H, W, 3)
        elif method == "thin plate":
            field = scipy.interpolate.RBFInterpolator(*points, kernel="thin_plate_spline")(query)  # (h*w, 3)
        else:
            field, nearest = (scipy.interpolate.griddata(*points, query, k) for k in (method, "nearest"))
            field = np.where(np.isnan(field), nearest, field)  # outside the convex hull
        fields.append(field.clip(0, 1) if field.ndim == 3 else field.clip(0, 1).reshape(*shape, 3))
    fields = resize(np.stack(fields), *shape).astype(np.float32)
    return np.where(observed.mask[..., None], observed.images, fields) if shape == own else fields


def resize(fields, height, width):
    """Fields (N, H, W, 3) in [0, 1] resampled by cubic splines with aligned pixel centres."""
    from skimage.transform import resize

    if fields.shape[1:3] == (height, width):
        return fields
    shrinks = height < fields.shape[1] or width < fields.shape[2]
    options = {"order": 3, "mode": "edge", "anti_aliasing": shrinks}
    return np.stack([resize(field, (height, width), **options) for field in fields]).clip(0, 1)


class Wiener:
    """The best linear estimate of unobserved pixels u from observed ones o (Wiener, 1949; simple kriging).
    v_u = m + C_uo (C_oo + ridge)^-1 (v_o - m), with the mean colour m and a covariance C of the offset of two
    pixels, all channels jointly, of training images (M, H, W, 3) mirrored at their borders."""

    def __init__(self, train_images):
        images = to_unit(train_images)
        self.height, self.width = sides = images.shape[1:3]
        self.mean = images.mean(axis=(0, 1, 2), dtype=np.float64)  # (3,)
        spectra = scipy.fft.dctn(images - self.mean, axes=(1, 2), norm="ortho")  # (M, H, W, 3)
        power = np.einsum("mhwi,mhwj->hwij", spectra, spectra) / len(images)  # (H, W, 3, 3)
        cosines = [np.cos(np.pi * np.outer(np.arange(n + 1), np.arange(n)) / n) / n for n in sides]
        self.covariance = np.einsum("yh,xw,hwij->yxij", *cosines, power, optimize=True)  # (H+1, W+1, 3, 3)
        lags = [np.abs(np.fft.fftfreq(2 * n, 1 / (2 * n))).astype(int) for n in sides]
        self.kernel = np.fft.rfft2(self.covariance[np.ix_(*lags)], axes=(0, 1))  # (2H, W+1, 3, 3)

    def fill(self, observed, size=None):
        """Fields (N, H, W, 3) of an `evaluate.Observed`, or resampled to (N, size, size, 3)."""
        fields = np.stack([self._fill(*p) for p in zip(observed.images, observed.mask, strict=True)])
        return resize(fields, size or self.height, size or self.width).astype(np.float32)

    def _fill(self, image, mask):
        row, column = mask.nonzero()  # (Ni,) each
        lags = [np.abs(index[:, None] - index) for index in (row, column)]  # (Ni, Ni) each
        among = self.covariance[tuple(lags)].transpose(0, 2, 1, 3).reshape(3 * len(row), -1)  # (3 Ni, 3 Ni)
        among[np.diag_indices_from(among)] += RIDGE * np.trace(self.covariance[0, 0]) / 3 + 1e-12
        solved = scipy.linalg.solve(among, (image[mask] - self.mean).ravel(), assume_a="pos")
        # Zero-padded to twice the size, the circular convolution is the sum over the observed pixels.
        weights = np.zeros((2 * self.height, 2 * self.width, 3))
        weights[row, column] = solved.reshape(-1, 3)
        spread = np.einsum("yxij,yxj->yxi", self.kernel, np.fft.rfft2(weights, axes=(0, 1)))
        spread = np.fft.irfft2(spread, s=weights.shape[:2], axes=(0, 1))[: self.height, : self.width]
        return np.where(mask[..., None], image, (self.mean + spread).clip(0, 1))
