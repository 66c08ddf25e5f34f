"""On the device: what was carried beside this file -> /tmp/ae/cifar.npz and /tmp/ae/windows.npz, what is there."""

import io
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

HERE, OUT = Path(__file__).parent, Path("/tmp/ae")


def opened(part):
    return np.stack([np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in part])


def decode(file):
    z = np.load(file)
    b, o = z["bytes"].tobytes(), z["offsets"]
    parts = [b[i:j] for i, j in zip(o[:-1], o[1:])]
    with Pool() as pool:
        return np.concatenate(pool.map(opened, [parts[i : i + 250] for i in range(0, len(parts), 250)])), z


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    if (HERE / "jpeg.npz").exists():
        L = {k: x.transpose(0, 2, 3, 1) for k, x in np.load(HERE / "lossless.npz").items() if x.ndim == 4}
        train = np.concatenate([L["train"], decode(HERE / "jpeg.npz")[0]])  # without twins of any lossless record
        np.savez(OUT / "cifar.npz", x_train=train, x_validation=L["val"], x_test=L["test"])
        print("cifar", len(train), len(L["val"]), len(L["test"]))
    if (HERE / "windows128_train.npz").exists():
        images, z = decode(HERE / "windows128_train.npz")
        held, n = [], 0
        for q in np.random.default_rng(4).permutation(np.unique(z["photograph"])):
            if n < 300:
                held.append(q)
                n += (z["photograph"] == q).sum()
        val, test = np.isin(z["photograph"], held), decode(HERE / "windows128_test.npz")[0]
        order = np.random.default_rng(0).permutation(val.sum())
        np.savez(OUT / "windows.npz", x_train=images[~val], x_validation=images[val][order], x_test=test)
        print("windows", (~val).sum(), val.sum(), len(test))
