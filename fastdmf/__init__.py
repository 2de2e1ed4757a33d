"""Deep matrix factorization: completion and sensing by descent on the factors of W = W_N ... W_1.

The map of the package (imports go only downwards in this list)::

    arrays       where arrays live, and how they come to the host
    losses       elementwise losses
    files        files that are there whole or not at all
    cuda, backend   a GPU behind one handle; numpy and the compiled kernels behind the same
    contract     what an operator is: Operator, Bound
    device_bounds   masks, dense and seeded measurements with their data on a GPU
    masks, seeded, operators   EntryMask; GaussianSeeded; GaussianDense, RankOne, any scipy LinearOperator
    chain        the factors: layout, products, gradients, starting points
    problem      operator + data + normalisation -> value and gradient
    second_order   Hessian-vector products and the sharpness of a point
    symmetry     symmetric parts of measurements
    rule         what a step rule is: Rule, State
    rescaled     the rule for quadratic networks
    scaled, mirror, subgradient, normalised   a paper's rule each
    auto, flow, rules   the default rule; gradient flow; gd, momentum, nesterov, group_rmsprop, adam
    engine       the one loop: records, stop tests, status
    checks, checkpoint   arguments that the solvers share; the state of a run in a file
    penalties    terms that are added to the objective
    diagnostics, theory, forecast   what a run can record; closed forms to call before it; warnings from them
    spectral     a start for descent from the data's leading singular vectors
    descent      solve(...)
    sweeps, sweep_table   sweep(...): a grid of descents, and the table of what they gave
    mask_features, alternating, held_entries, row_subset   what the variational solver is made of
    factor_model   a fitted matrix: predictions, rows and columns that come later
    mean_model   the mean of several such fits
    ids, entries   what people call rows and columns, and how they hold entries
    column_text, tables   CSV and its like; entries and tables read from files and written to them
    shards       entries on disk: write_shards(...), EntryShards
    variational  vbmf(...)
    tangent, continuation, noisy_fit   what recovery is made of
    recovery     recover(...)
    row_models, row_neighbours, covariance   tables as draws of one distribution
    progress     what a fit tells while it runs: the log, a stream, scikit-learn's callbacks
    fit_parts    the solver runs that a fit consists of: their checkpoints, and all or none
    fitting      what the estimators share
    entry_kfold  EntryKFold: cross-validation over entries
    row_fits, table_descent, table_choice   a table's fits: variational, full covariance; descent, recovery; the best
    imputer, sensing, completer, quadratic   DMFImputer, DMFSensing, DMFCompleter, DMFQuadratic: the scikit-learn
                 estimators
    saving       save(estimator, path), load(path)
    display_axes, display_records   what pictures share: axes; records of runs and columns of tables
    display_values, display_curves, display_phase, display_images   singular values, errors and effective rank, phase
                 transitions, completed matrices: by matplotlib
    demo, warmup   the demonstration; kernels compiled ahead
    command_files, command_config, command_fit   what the commands share: files, options from a file, fits
    command_host, command_shards, command_entries, command_table   demo, warmup, info; shard; complete, predict; impute
    cli          the ``fastdmf`` command: options, exit codes, messages

Public names are loaded on first use, so that ``import fastdmf`` costs milliseconds.
"""

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "EntryMask": "masks",
    "EntryShards": "shards",
    "GaussianDense": "operators",
    "GaussianSeeded": "seeded",
    "Operator": "contract",
    "RankOne": "operators",
    "Solution": "engine",
    "Status": "engine",
    "load": "saving",
    "recover": "recovery",
    "save": "saving",
    "solve": "descent",
    "sweep": "sweeps",
    "SweepTable": "sweep_table",
    "spectral_factors": "spectral",
    "symmetric_part": "symmetry",
    "vbmf": "variational",
    "write_shards": "shards",
    "EffectiveRankDisplay": "display_curves",
    "ErrorDisplay": "display_curves",
    "InpaintingDisplay": "display_images",
    "PhaseTransitionDisplay": "display_phase",
    "SingularValuesDisplay": "display_values",
    "DMFCompleter": "completer",
    "DMFImputer": "imputer",
    "DMFQuadratic": "quadratic",
    "DMFSensing": "sensing",
    "EntryKFold": "entry_kfold",
}

_MODULES = ("backend", "diagnostics", "engine", "losses", "operators", "penalties", "rules", "tables", "theory")

__all__ = sorted([*_HOME, *_MODULES])


def _extend_path():
    """Let a source tree that was never installed find ``kernels``, which lies beside this package."""
    from os.path import abspath, dirname, isdir, isfile, join

    here = dirname(abspath(__file__))
    root = dirname(here)
    in_tree = isfile(join(root, "kernels", "__init__.py")) and isfile(join(root, "pyproject.toml"))
    if in_tree and not isdir(join(here, "kernels")):
        __path__.append(root)


_extend_path()


def __getattr__(name):
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"fastdmf.{name}")
    if name in _HOME:
        value = getattr(import_module(f"fastdmf.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastdmf' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
