"""The methods that ``peers.py`` compares, each with its settings said in its row of the tables below.

A method of ``RATINGS`` is ``fit(problem, iterations, seed)`` and returns ``predict(rows, cols)``; one of ``MATRICES``
is ``fit(problem, seed)`` and returns the filled matrix. ``iterations`` None is the method's own default or its own
stop. No method sees a test entry. Settings of peers follow their documentation or were found best by others on these
very data, which favours them.
"""

import warnings
from dataclasses import dataclass

import numpy as np


@dataclass
class Method:
    """A row of the table.

    Attributes
    ----------
    fit : callable
    settings : str
        What a reader needs to repeat it.
    iterations : tuple of int
        Where the curve of error against time is taken; empty: no curve.
    largest : int
        Training entries above which the method is left out, for it would take too long.
    """

    fit: callable
    settings: str
    iterations: tuple = ()
    largest: int = 100_000_000


# ---------------------------------------------------------------- ratings


def _fastdmf(problem, iterations, seed):
    from scipy.sparse import coo_matrix

    from fastdmf import DMFCompleter

    x = coo_matrix((problem.train[2], problem.train[:2]), problem.shape)
    model = DMFCompleter(max_iter=iterations, random_state=seed).fit(x)
    return lambda i, j: model.predict(np.stack([i, j], axis=1))


def _biases(problem, iterations, seed):
    rows, cols, y = problem.train
    mean = y.mean(dtype=np.float64)
    b, c = np.zeros(problem.shape[0]), np.zeros(problem.shape[1])
    for _ in range(iterations or 10):
        for bias, other, at, across, damping in ((c, b, cols, rows, 10), (b, c, rows, cols, 15)):
            sums = np.bincount(at, y - mean - other[across], len(bias))
            bias[:] = sums / (np.bincount(at, minlength=len(bias)) + damping)
    return lambda i, j: mean + b[i] + c[j]


def _cmfrec(implicit):
    def fit(problem, iterations, seed):
        from cmfrec import CMF
        from scipy.sparse import coo_matrix

        size = len(problem.train[2])
        k, ridge = (10, 10.0) if size < 500_000 else (40, 20.0) if size < 5_000_000 else (16, 20.0)
        x = coo_matrix((problem.train[2], problem.train[:2]), problem.shape)
        extra = {} if iterations is None else {"niter": iterations}
        model = CMF(
            k=k,
            lambda_=ridge,
            add_implicit_features=implicit,
            random_state=seed,
            verbose=False,
            use_float=True,
            precompute_for_predictions=False,
            **extra,
        )
        return model.fit(x).predict

    return fit


def _surprise(problem, iterations, seed):
    import pandas as pd
    import surprise

    frame = pd.DataFrame(dict(zip("ijy", problem.train)))
    reader = surprise.Reader(rating_scale=problem.limits)
    train = surprise.Dataset.load_from_df(frame, reader).build_full_trainset()
    model = surprise.SVD(n_epochs=iterations or 40, lr_all=0.01, reg_all=0.1, random_state=seed).fit(train)

    def known(to_inner, n):
        return np.array([to_inner.get(k, -1) for k in range(n)])

    rows = known(train._raw2inner_id_users, problem.shape[0])
    cols = known(train._raw2inner_id_items, problem.shape[1])

    def predict(i, j):
        i, j = rows[i], cols[j]
        a, b = i >= 0, j >= 0
        latent = np.einsum("kh,kh->k", model.pu[i], model.qi[j])
        return train.global_mean + a * model.bu[i] + b * model.bi[j] + (a & b) * latent

    return predict


def _myfm(plus):
    def fit(problem, iterations, seed):
        import myfm
        from scipy.sparse import csr_matrix, hstack, identity

        (rows, cols, y), (n1, n2) = problem.train, problem.shape
        mask = csr_matrix((np.ones(len(y)), (rows, cols)), problem.shape)

        def block(seen):
            unit = csr_matrix(
                (np.repeat(np.diff(seen.indptr) ** -0.5, np.diff(seen.indptr)), seen.indices, seen.indptr)
            )
            unit.resize(seen.shape)
            return hstack([identity(seen.shape[0], format="csr"), unit], format="csr")

        def relations(i, j):
            blocks = zip((i, j), tables)
            return [myfm.RelationBlock(np.asarray(at).astype(np.int64), table) for at, table in blocks]

        rank = (10 if len(y) < 500_000 else 20) if plus else 10
        if plus:
            tables = block(mask), block(mask.T.tocsr())
            groups = [n1, n2, n2, n1]
        else:
            tables, groups = (identity(n1, format="csr"), identity(n2, format="csr")), [n1, n2]
        model = myfm.MyFMRegressor(rank=rank, random_seed=seed)
        draws = iterations or 200
        model.fit(
            None,
            y.astype(float),
            relations(rows, cols),
            n_iter=draws,
            n_kept_samples=draws - draws // 10,
            group_shapes=groups,
        )
        return lambda i, j: model.predict(None, relations(i, j))

    return fit


def _torch(problem, iterations, seed):
    """Biases and dot product by Adam on minibatches; the epoch best on 5 % of the training entries is kept."""
    import torch

    torch.manual_seed(seed)
    rows, cols, y = (torch.from_numpy(np.ascontiguousarray(a)) for a in problem.train)
    rows, cols, y = rows.long(), cols.long(), y.float()
    size = len(y)
    k, batch = (20, 1024) if size < 500_000 else (64, 4096) if size < 5_000_000 else (16, 65_536)
    order = torch.randperm(size)
    held, kept = order[: size // 20], order[size // 20 :]
    mean = y[kept].mean()
    shapes = [(n, width) for n in problem.shape for width in (k, 1)]
    p, b, q, c = params = [
        (0.1 / k**0.5 * torch.randn(s) if s[1] > 1 else torch.zeros(s)).requires_grad_() for s in shapes
    ]
    step = torch.optim.Adam(params, lr=0.005)

    def predict(i, j):
        return mean + (b[i] + c[j])[:, 0] + (p[i] * q[j]).sum(1)

    def error(index):
        with torch.no_grad():
            parts = [((predict(rows[at], cols[at]) - y[at]) ** 2).sum() for at in index.split(1 << 20)]
        return float(sum(parts)) / len(index)

    best, since, epoch = (np.inf, None), 0, 0
    while since < 3 and epoch < (iterations or 100):
        for at in kept[torch.randperm(len(kept))].split(batch):
            i, j = rows[at], cols[at]
            wrong = predict(i, j) - y[at]
            ridge = 0.02 * sum((t**2).sum() for t in (p[i], q[j], b[i], c[j]))
            step.zero_grad()
            (((wrong**2).sum() + ridge) / len(at)).backward()
            step.step()
        epoch, since = epoch + 1, since + 1
        now = error(held)
        if now < best[0]:
            best, since = (now, [t.detach().clone() for t in params]), 0
    p, b, q, c = best[1]

    def answer(i, j):
        index = [torch.from_numpy(np.asarray(a)).long() for a in (i, j)]
        return torch.cat([predict(*at) for at in zip(*(a.split(1 << 20) for a in index))]).numpy()

    return answer


RATINGS = {
    "fastdmf": Method(_fastdmf, "DMFCompleter(), defaults", (1, 2, 3, 4, 5, 6, 8, 12)),
    "damped biases": Method(_biases, "damping 10 (columns), 15 (rows), 10 alternations (Koren 2010)"),
    "cmfrec": Method(
        _cmfrec(False), "CMF, 10 iterations; k, lambda: 100K 10, 10; 1M 40, 20; more 16, 20", (1, 2, 3, 5, 10)
    ),
    "cmfrec implicit": Method(
        _cmfrec(True), "the same with add_implicit_features", (1, 2, 3, 5, 10), largest=5_000_000
    ),
    "surprise": Method(
        _surprise, "SVD, 100 factors, 40 epochs, rate 0.01, ridge 0.1", (5, 10, 20, 40), largest=5_000_000
    ),
    "myFM": Method(_myfm(False), "Gibbs, rank 10, 200 draws", (10, 25, 50, 100, 200), largest=5_000_000),
    "myFM SVD++": Method(
        _myfm(True),
        "the same with SVD++ relations both ways; rank: 100K 10, 1M 20",
        (10, 25, 50, 100, 200),
        largest=5_000_000,
    ),
    "torch": Method(
        _torch, "Adam 0.005, ridge 0.02, 5 % held out, patience 3; width 100K 20, 1M 64, more 16", (1, 2, 4, 8, 16)
    ),
}


# ---------------------------------------------------------------- matrices


def _dmf_imputer(problem, seed):
    from fastdmf import DMFImputer

    return DMFImputer(random_state=seed).fit_transform(problem.matrix())


def _mean(problem, seed):
    from sklearn.impute import SimpleImputer

    return SimpleImputer(keep_empty_features=True).fit_transform(problem.matrix())


def _knn(problem, seed):
    from sklearn.impute import KNNImputer

    return KNNImputer(keep_empty_features=True).fit_transform(problem.matrix())


def _knn_transposed(problem, seed):
    from sklearn.impute import KNNImputer

    return KNNImputer(keep_empty_features=True).fit_transform(problem.matrix().T).T


def _iterative(problem, seed):
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return IterativeImputer(random_state=seed, keep_empty_features=True).fit_transform(problem.matrix())


def _soft_impute(problem, seed):
    """Mazumder, Hastie and Tibshirani 2010, algorithm 1, warm starts along lambda; 5 % of the cells choose lambda."""
    x = problem.matrix()
    known = np.flatnonzero(~np.isnan(x))
    held = np.random.default_rng(seed).permutation(known)[: max(len(known) // 20, 1)]
    center = np.nanmean(x)
    scale = np.nanstd(x, axis=0) if problem.scale is not None and (problem.scale != 1).any() else np.ones(x.shape[1])
    scale = np.where(scale > 0, scale, 1)
    shift = np.nanmean(x, axis=0) if (scale != 1).any() else np.full(x.shape[1], center)
    x = np.nan_to_num((x - shift) / scale)

    def path(seen, lambdas):
        z = np.zeros_like(x)
        target = np.where(seen, x, 0)
        top = np.linalg.norm(target, 2)
        for weight in lambdas:
            for _ in range(100):
                u, s, v = np.linalg.svd(np.where(seen, target, z), full_matrices=False)
                keep = s > weight * top
                new = (u[:, keep] * (s[keep] - weight * top)) @ v[keep]
                change = np.sum((new - z) ** 2) / max(np.sum(z**2), 1e-12)
                z = new
                if change < 1e-5:
                    break
            yield z

    lambdas = np.geomspace(0.5, 0.005, 12)
    seen = np.zeros(x.size, bool)
    seen[known] = True
    fewer = seen.copy()
    fewer[held] = False
    errors = [np.sum((z.flat[held] - x.flat[held]) ** 2) for z in path(fewer.reshape(x.shape), lambdas)]
    for z in path(seen.reshape(x.shape), lambdas[: int(np.argmin(errors)) + 1]):
        result = z
    return result * scale + shift


MATRICES = {
    "fastdmf": Method(_dmf_imputer, "DMFImputer(), defaults"),
    "mean": Method(_mean, "SimpleImputer()"),
    "KNN": Method(_knn, "KNNImputer(), 5 neighbours"),
    "KNN transposed": Method(_knn_transposed, "KNNImputer() on the transpose"),
    "IterativeImputer": Method(_iterative, "defaults (BayesianRidge, 10 rounds)"),
    "soft-impute": Method(_soft_impute, "12 lambdas, 5 % of the cells held out choose one"),
}
