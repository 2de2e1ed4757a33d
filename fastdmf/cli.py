"""The ``fastdmf`` command: its options, exit codes and messages.

Results go to files or to stdout, everything else to stderr. Everything slow is imported inside the function of the
command that needs it, so that ``--help`` and wrong usage answer at once. What the commands do is in ``command_entries``
(complete, predict), ``command_shards`` (shard), ``command_table`` (impute) and ``command_host`` (demo, warmup, info).
"""

import argparse
import csv
import difflib
import math
import os
import re
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdmf import __version__
from fastdmf.command_config import with_config
from fastdmf.command_files import INTERRUPTED, UsageError

__all__ = ["main"]

_CODES = """\
exit codes:
  0    done
  1    failed: one line says why, --debug shows the traceback
  2    wrong usage: an option, or a key of --config
  130  interrupted by Ctrl-C; during the steps of a fit, what it had found so far is written
  141  whoever read standard output stopped reading
"""
_BROKEN_PIPE = 141
_SOLVERS = ("auto", "variational", "descent", "recovery")
_DUPLICATES = ("error", "sum", "mean", "last")
# Arguments of the library that an option has another name for.
_SPELLED = {
    "n_threads": "threads",
    "random_state": "seed",
    "validation_fraction": "validation",
    "return_std": "std",
    "keep_empty_features": "keep-empty",
    "row": "columns",
    "column": "columns",
    "value": "columns",
}


def main(argv=None):
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the program's name; default those of the process.

    Raises
    ------
    SystemExit
        From argparse: 0 after ``--help`` and ``--version``, 2 on wrong usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None and not unknown:
        parser.print_help(sys.stderr)
        return 2
    if unknown:
        _refuse(unknown, getattr(args, "parser", parser))
    try:
        with _warnings_as_lines(args):
            if getattr(args, "config", None) is not None:
                vars(args).update(with_config(args.parser, argv[argv.index(args.command) + 1 :], args.config))
            code = args.call(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # What is left in the buffer must not raise once more when Python ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except UsageError as error:
        _complain(f"{args.parser.prog}: error: {error} ({args.parser.prog} --help)")
        return 2
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        if _interrupted(error):
            _complain("\nfastdmf: interrupted")
            return INTERRUPTED
        _complain(f"fastdmf: error: {_explained(error, args)}")
        return 1


def _refuse(unknown, parser):
    """End with what was not understood, and the option that it may stand for."""
    near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}")


def _complain(text):
    """Say something on stderr, unless nobody listens."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _interrupted(error):
    """Whether Ctrl-C is behind an error: what it strikes may fail in its own way."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _warnings_as_lines(args):
    """Let the library's warnings be one line each, and each only once."""
    said = set()

    def show(message, category, *place):
        text = re.sub(r"^DMF\w+: ", "", _in_options(" ".join(str(message).split()), args))
        if issubclass(category, (UserWarning, RuntimeWarning)) and text not in said:
            said.add(text)
            _complain(f"fastdmf: warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _explained(error, args):
    """Return one line for an error, in terms of the command line where it names arguments of the library."""
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return f"out of memory{said}: take fewer cells at a time; 'fastdmf shard' takes files of entries of any size"
    text = " ".join(str(error).split("\n")) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    # What the library says to its users needs no traceback.
    expected = isinstance(error, (OSError, ValueError, TypeError, ImportError))
    return _in_options(text, args) + ("" if expected else " (--debug shows the traceback)")


def _in_options(text, args):
    """Return a text of the library with its arguments as the options of this command."""
    for path, name in getattr(args, "said", {}).items():
        text = text.replace(path, name)
    text = text.replace("separator=':', row=0, column=2, value=4", "--separator : --columns 0,2,4")
    text = text.replace("write_shards(...)", "'fastdmf shard'")
    options = {action.dest: action.option_strings[0] for action in args.parser._actions if action.option_strings}

    def option(match):
        name, value = match[1], match[2]
        name = options.get(_SPELLED.get(name, name).replace("-", "_"))
        if name is None:
            return match[0]
        if value is None:
            return name
        no = "--no-" + name.removeprefix("--")
        if value in ("True", "False") and no in args.parser._option_string_actions:
            return name if value == "True" else no
        return f"{name} {_WORDS.get(value, value.strip(chr(39)))}"

    text = re.sub(r"\b([a-z_]+)=('[^']*'|\w+)?", option, text)
    text = re.sub(r"^[a-z_]+(?= must be )", lambda match: options.get(match[0], match[0]), text)
    # A word with an underscore is the argument, whatever is said of it.
    text = re.sub(r"(?<![\w-])[a-z]+(_[a-z]+)+(?![\w=])", lambda match: options.get(match[0], match[0]), text)
    return re.sub(r"(--duplicates sum), 'mean' or 'last'", r"\1, mean or last", text)


_WORDS = {"True": "yes", "False": "no", "None": "none"}

# --- options ---------------------------------------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastdmf",
        description="Deep matrix factorization: complete a matrix of which some entries are known, fill the holes\n"
        "of a table, and predict from what was learned.",
        epilog=_EXAMPLES + "\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastdmf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (_add_complete, _add_predict, _add_impute, _add_shard, _add_demo, _add_warmup, _add_info):
        add(commands)
    return parser


_EXAMPLES = """\
examples:
  fastdmf complete ratings.csv --out filled.parquet
  fastdmf complete ratings.csv --top 10 --out best.csv --model model.npz
  fastdmf predict model.npz pairs.csv --out predictions.csv --std
  fastdmf impute table.csv --out filled.csv
"""


def _command(commands, name, call, text, *, usage=None, examples="", codes=True, description=None):
    """Add a command; its parser and what it calls come with its arguments."""
    parser = commands.add_parser(
        name,
        usage=usage,
        help=text,
        description=description or f"{text[0].upper()}{text[1:]}.",
        epilog="\n".join(filter(None, (examples, _CODES if codes else ""))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(call=call, parser=parser)
    return parser


def _add_complete(commands):
    parser = _command(
        commands,
        "complete",
        _complete,
        "complete a matrix of which some entries are known, such as ratings",
        usage="fastdmf complete ENTRIES (--out FILE | --model FILE) [options]",
        description="Complete a matrix of which some entries are known, such as ratings. ENTRIES is a file with one\n"
        "entry a line (row, column, value; rows and columns are called by integers or by any text), a\n"
        "matrix, or a folder of 'fastdmf shard'.",
        examples="""\
examples:
  fastdmf complete ratings.csv --out filled.parquet          every cell, known or not
  fastdmf complete ratings.csv --cells missing --out new.csv.gz
  fastdmf complete ratings.csv --pairs asked.csv --std --out predictions.csv
  fastdmf complete ratings.tsv --top 10 --out best.csv --model model.npz
  fastdmf complete ratings.dat --separator : --columns 0,2,4 --top 5 --out -
  fastdmf complete log.csv --columns user,film,stars --duplicates last --out filled.csv
  zcat ratings.csv.gz | fastdmf complete - --out - | sort
""",
    )
    parser.add_argument(
        "entries",
        type=Path,
        metavar="ENTRIES",
        help="CSV, TSV or the like (also gzipped), parquet, MatrixMarket, scipy's sparse .npz, .npy with NaN in its "
        "holes; a folder of shards; - for standard input. Told apart by their content",
    )
    group = parser.add_argument_group("what is written")
    _add_out(
        group,
        "predictions, by its name a .csv, .tsv (also .gz) or .parquet; or an .npz or .mtx if ids are positions",
    )
    group.add_argument("--model", type=Path, metavar="FILE", help="also save the model (.npz), for 'fastdmf predict'")
    group.add_argument("--pairs", type=Path, metavar="FILE", help="predict these pairs (row, column) and no others")
    group.add_argument("--top", type=_count(1), metavar="K", help="only the K highest predictions of each row")
    group.add_argument(
        "--cells",
        choices=("all", "missing"),
        help="all cells, or those without an entry (default: all; missing with --top)",
    )
    group.add_argument(
        "--max-cells",
        type=_count(1),
        default=10_000_000,
        metavar="N",
        help="refuse to write more cells (default: %(default)s)",
    )
    _add_std(group)
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--solver",
        choices=_SOLVERS,
        default="auto",
        help="auto is variational; descent is that from a small start; recovery is for entries without noise",
    )
    _add_size(group)
    group.add_argument(
        "--biases",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether rows and columns have biases; without is better for matrices of exactly low rank",
    )
    group.add_argument(
        "--implicit-features",
        action=argparse.BooleanOptionalAction,
        help="whether which entries are known informs the model, right for ratings (default: where it helps the fit)",
    )
    group.add_argument(
        "--n-init", type=_count(1), default=1, metavar="N", help="average N fits from other starts (default: 1)"
    )
    _add_length(group)
    group.add_argument("--tol", type=_positive, metavar="X", help="gain at which the fit ends (default: the solver's)")
    _add_bounds(group, "the observed values'")
    group.add_argument(
        "--duplicates",
        choices=_DUPLICATES,
        default="error",
        help="what becomes of an entry that comes more than once (default: error)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        help="precision of the fit: float32 takes half the memory and time (default: the file's; float64 for text)",
    )
    _add_reading(
        parser,
        "names of the columns of row, column and value, or their places from 0, as in user,item,rating "
        "(default: the first three); the first two also name those of --pairs",
    )
    _add_running(parser)


def _add_predict(commands):
    parser = _command(
        commands,
        "predict",
        _predict,
        "predict pairs (row, column) by a model that 'complete --model' saved",
        usage="fastdmf predict MODEL PAIRS [--out FILE] [options]",
        examples="""\
examples:
  fastdmf predict model.npz pairs.csv --out predictions.csv
  fastdmf predict model.npz pairs.csv --std | head
  echo ann,12 | fastdmf predict model.npz -
""",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="what --model or fastdmf.save wrote")
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS",
        help="a file of pairs, one a line, in any format that 'complete' reads; - for standard input. A row or column "
        "that the model does not know is predicted by the mean and the bias of the other",
    )
    group = parser.add_argument_group("what is written")
    _add_out(group, "predictions, a .csv, .tsv (also .gz) or .parquet (default: -)", default=Path("-"))
    _add_std(group)
    _add_reading(parser, "names of the columns of row and column, or their places from 0 (default: the first two)")
    group = _add_common(parser)
    group.add_argument("--threads", type=_count(1), metavar="N", help="threads (default: all cores)")


def _add_impute(commands):
    parser = _command(
        commands,
        "impute",
        _impute,
        "fill the holes of a table of numbers",
        usage="fastdmf impute TABLE --out FILE [options]",
        description="Fill the holes of a table of numbers, of which each row is an observation. Names of columns and\n"
        "of rows are kept, and what is known stays as it is.",
        examples="""\
examples:
  fastdmf impute table.csv --out filled.csv
  fastdmf impute table.csv --out filled.csv --std-out deviations.csv
  fastdmf impute sensors.csv --rows station --missing -999 --min-value 0 --out filled.parquet
""",
    )
    parser.add_argument(
        "table",
        type=Path,
        metavar="TABLE",
        help="CSV, TSV or the like (also gzipped), parquet, dense .npy or MatrixMarket; - for standard input. A hole "
        "is an empty cell, NA, NaN, null, None or N/A",
    )
    group = parser.add_argument_group("what is written")
    _add_out(group, "the filled table, by its name a .csv, .tsv (also .gz) or .parquet, or .npy without names")
    group.add_argument(
        "--std-out",
        type=Path,
        metavar="FILE",
        help="a table like it of standard deviations, 0 where the value was known",
    )
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--solver",
        choices=("auto", "variational", "gaussian", "descent", "recovery"),
        default="auto",
        help="auto lets held-out entries choose; gaussian is the full covariance",
    )
    _add_size(group)
    _add_length(group)
    _add_bounds(group, "none")
    group.add_argument(
        "--standardize",
        choices=("auto", "yes", "no"),
        default="auto",
        help="bring columns to one scale (default: auto, where their units differ)",
    )
    group.add_argument(
        "--keep-empty",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fill columns without any value by the mean of the others, or drop them",
    )
    _add_reading(parser, None)
    parser.reading.add_argument(
        "--rows",
        metavar="NAME",
        default="auto",
        help="column of the ids of rows, by name or place from 0, or none (default: the first one if it holds no "
        "numbers or has no name)",
    )
    parser.reading.add_argument(
        "--missing",
        type=_words,
        default=(),
        metavar="TEXT,...",
        help="more texts that mark a hole, such as -999 (as in --missing=-999)",
    )
    _add_running(parser)


def _add_shard(commands):
    parser = _command(
        commands,
        "shard",
        _shard,
        "write entries to a folder that 'complete' fits from without holding them in memory",
        usage="fastdmf shard ENTRIES [ENTRIES ...] --out FOLDER [options]",
        examples="""\
examples:
  fastdmf shard part-*.csv.gz --out ratings.shards
  fastdmf complete ratings.shards --top 10 --out best.parquet
""",
    )
    parser.add_argument(
        "entries",
        type=Path,
        nargs="+",
        metavar="ENTRIES",
        help="files in any format that 'complete' reads; text and parquet may be larger than memory",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="new or empty folder")
    group.add_argument(
        "--positions",
        action="store_true",
        help="rows and columns are positions from 0 instead of ids: quicker, and no id is kept",
    )
    group.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="of the values (default: float32)"
    )
    group.add_argument(
        "--shard-entries",
        type=_count(1),
        default=1 << 22,
        metavar="N",
        help="entries in one run of rows or of columns (default: %(default)s)",
    )
    _add_reading(
        parser, "names of the columns of row, column and value, or their places from 0 (default: the first three)"
    )
    _add_common(parser)


def _add_demo(commands):
    text = "fill the holes of a real elevation grid, beside scikit-learn's imputers"
    parser = _command(commands, "demo", _demo, text, codes=False)
    parser.add_argument(
        "--out",
        type=_png,
        default=Path("fastdmf-demo.png"),
        metavar="FILE.png",
        help="picture to write (default: %(default)s in the current folder)",
    )
    parser.add_argument(
        "--hide", type=_fraction, default=0.5, metavar="F", help="fraction of the cells to hide (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of the holes and the methods (default: %(default)s)"
    )
    _add_debug(parser)


def _add_warmup(commands):
    text = "compile the kernels ahead of the first fit"
    description = f"{text[0].upper()}{text[1:]}, into numba's cache on disk; what is there already is only loaded."
    _add_debug(_command(commands, "warmup", _warmup, text, codes=False, description=description))


def _add_info(commands):
    _add_debug(_command(commands, "info", _info, "print versions, threads and devices", codes=False))


def _add_out(group, text, default=None):
    group.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"{text}; - for standard output. A former file is replaced, in one step at the end",
    )
    group.add_argument(
        "--format",
        choices=("csv", "tsv", "parquet"),
        default="csv",
        help="of what goes to standard output (default: csv)",
    )


def _add_std(group):
    group.add_argument("--std", action="store_true", help="add a column of standard deviations")


def _add_size(group):
    group.add_argument("--depth", type=_count(1), metavar="N", help="number of factors (default: the solver's)")
    group.add_argument(
        "--width",
        type=_width,
        metavar="N",
        help="bound on the rank; of the descent also N,N,... (default: its own)",
    )


def _add_length(group):
    group.add_argument(
        "--max-iter", type=_count(1), metavar="N", help="sweeps, or steps of the descent (default: the solver's)"
    )
    group.add_argument(
        "--validation",
        type=_share,
        default=0.1,
        metavar="F",
        help="fraction of the entries held out, where the solver holds out any (default: %(default)s)",
    )


def _add_bounds(group, default):
    for name, side in (("--min-value", "lower"), ("--max-value", "upper")):
        group.add_argument(
            name,
            type=_bound(-math.inf if side == "lower" else math.inf),
            metavar="X",
            help=f"{side} bound on predictions, or 'free' (default: {default})",
        )


def _add_reading(parser, columns):
    group = parser.add_argument_group("how text is read")
    parser.reading = group
    if columns is not None:
        group.add_argument("--columns", type=_columns, metavar="NAMES", help=columns)
    group.add_argument(
        "--separator", type=_separator, metavar="C", help="one character, or 'tab' (default: found in the first lines)"
    )
    group.add_argument(
        "--header",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether the first line holds names (default: auto, where it looks like it)",
    )
    group.add_argument(
        "--decimal", choices=(".", ","), default=".", metavar="C", help="decimal point, . or , (default: .)"
    )
    group.add_argument("--encoding", default="utf-8", metavar="NAME", help="such as latin-1 (default: utf-8)")


def _add_running(parser):
    group = _add_common(parser)
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of all draws (default: %(default)s)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    group.add_argument(
        "--threads", type=_count(1), metavar="N", help="threads, which change no result (default: all cores)"
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="keep the state of the fit there, from which --resume goes on after a crash or Ctrl-C; it is deleted once "
        "the result is written",
    )
    group.add_argument("--resume", action="store_true", help="go on from the state in --checkpoint")
    group.add_argument(
        "--checkpoint-every",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="between two writings of the state (default: 60)",
    )


def _add_common(parser):
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="a TOML file of options, such as depth = 3 and min-value = 1; the command line wins",
    )
    group.add_argument("--quiet", action="store_true", help="no progress and no notes, only warnings and errors")
    _add_debug(group)
    return group


def _add_debug(group):
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


# --- values of options -----------------------------------------------------------------------------------------------


def _png(text):
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"the picture is a PNG: {text!r} should end in .png")
    return path


def _number(text, what, accepts):
    """Return the number that ``text`` says, which must be accepted."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not accepts(value):
        raise argparse.ArgumentTypeError(f"{what} is needed, got {text!r}")
    return value


def _fraction(text):
    return _number(text, "a number from 0.01 to 0.99", lambda value: 0.01 <= value <= 0.99)


def _share(text):
    return _number(text, "a number from 0 to below 1", lambda value: 0 <= value < 1)


def _positive(text):
    return _number(text, "a number above 0", lambda value: 0 < value < math.inf)


def _seconds(text):
    return _number(text, "a number of seconds", lambda value: 0 <= value < math.inf)


def _bound(free):
    return lambda text: free if text == "free" else _number(text, "a number, or 'free'", lambda value: value == value)


def _count(least):
    def count(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"an integer from {least} is needed, got {text!r}")
        return value

    return count


def _width(text):
    widths = tuple(_count(1)(part) for part in text.split(","))
    return widths if len(widths) > 1 else widths[0]


def _seed(text):
    value = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"an integer from 0 to 2**32 - 1 is needed, got {text!r}")
    return value


def _words(text):
    return tuple(next(csv.reader([text]), ()))


def _columns(text):
    """Return names as str and places as int; quotes protect commas, and digits that are a name."""
    quoted = re.findall(r'(?:^|,)\s*("?)', text)
    names = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), ())]
    if len(names) not in (2, 3) or "" in names:
        raise argparse.ArgumentTypeError(f"two or three names or places from 0 are needed, as in 0,1,3, got {text!r}")
    return tuple(
        int(name) if re.fullmatch("[0-9]+", name) and not quote else name for name, quote in zip(names, quoted)
    )


def _separator(text):
    text = {"tab": "\t", r"\t": "\t"}.get(text, text)
    if len(text) != 1:
        hint = "; of lines like 1::2::3 the separator : makes columns 0, 2 and 4" if text == "::" else ""
        raise argparse.ArgumentTypeError(f"one character or 'tab' is needed, got {text!r}{hint}")
    return text


# --- commands --------------------------------------------------------------------------------------------------------


def _complete(args):
    from fastdmf.command_entries import complete

    return complete(args)


def _predict(args):
    from fastdmf.command_entries import predict

    return predict(args)


def _impute(args):
    from fastdmf.command_table import impute

    return impute(args)


def _shard(args):
    from fastdmf.command_shards import shard

    return shard(args)


def _demo(args):
    from fastdmf.command_host import demo

    return demo(args)


def _warmup(args):
    from fastdmf.command_host import warmup

    return warmup(args)


def _info(args):
    from fastdmf.command_host import info

    return info(args)


if __name__ == "__main__":
    sys.exit(main())
