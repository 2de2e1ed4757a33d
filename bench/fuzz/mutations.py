"""Strategies that change bytes and JSON, and the odd values that all targets try."""

import copy

from hypothesis import strategies as st

__all__ = ["JUNK", "applied", "byte_changes", "edited", "json_edits"]

byte_changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "drop", "double", "insert", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4),
    ),
    max_size=4,
)


def applied(content, changes):
    """Return bytes with changes of :data:`byte_changes` made one after the other."""
    content = bytearray(content)
    for what, place, data in changes:
        at = int(place * len(content))
        if what == "flip" and content:
            content[at] ^= data[0]
        elif what == "set":
            content[at : at + len(data)] = data
        elif what == "drop":
            del content[at : at + data[0]]
        elif what == "double":
            content[at:at] = content[at : at + data[0]]
        elif what == "insert":
            content[at:at] = data
        elif what == "end":
            del content[at:]
    return bytes(content)


# What stands where something else is expected, in JSON.
JUNK = [
    None,
    True,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**63,
    10**12,
    10**30,
    0.5,
    -1.5,
    1e308,
    "",
    "x",
    "array",
    "auto",
    "\0",
    "../x",
    "é",
    [],
    [0],
    [1, 2],
    [[1], [2]],
    ["a", "b"],
    [10**9, 10**9],
    {},
    {"array": 0},
    {"array": -1},
    {"array": 10**9},
    {"scalar": 0},
    {"texts": [[3], 0, 1]},
    {"texts": [[10**9], 0, 0]},
    {"objects": [[2], [1, 2]]},
    {"list": [1, None]},
    {"tuple": [[1], 2]},
    {"dict": [[1, 2]]},
    {"dict": [[[1], 2]]},
    {"float": "nan"},
    {"float": [1]},
    {"pandas.NA": None},
    {"object": ["Status", {"name": "CONVERGED"}]},
    {"object": ["Positions", {"name": "row", "n": 10**13}]},
    {"object": ["Positions", {"name": "row", "n": -3}]},
    {"object": ["MissingIndicator", {"n": 10**13, "features": [0]}]},
    {"object": ["RandomState", {"state": {"tuple": ["MT19937", {"array": 0}, 999, 0, 0.0]}}]},
    {"object": ["GradientDescent", {"lr": 0.1}]},
    {"object": ["IdTable", {"name": "row", "ids": [1, 2]}]},
]

json_edits = st.lists(
    st.tuples(
        st.lists(st.floats(0, 1, exclude_max=True), max_size=7),
        st.sampled_from(["put", "drop", "swap", "nudge"]),
        st.integers(0, len(JUNK) - 1),
    ),
    min_size=1,
    max_size=3,
)


def edited(tree, edits):
    """Return a copy of a JSON tree with edits of :data:`json_edits`: each walks down to a node and changes it."""
    tree = copy.deepcopy(tree)
    for steps, what, junk in edits:
        parent, key, node = None, None, tree
        for step in steps:
            if not isinstance(node, (dict, list)) or not node:
                break
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, keys[int(step * len(keys))]
            node = parent[key]
        if parent is None:
            continue
        if what == "drop":
            del parent[key]
        elif what == "swap" and isinstance(parent, dict):
            other = list(parent)[junk % len(parent)]
            parent[key], parent[other] = parent[other], parent[key]
        elif what == "nudge" and isinstance(node, (int, float)):
            parent[key] = [node + 1, node - 1, -node, 2 * node, node * 1000, float(node)][junk % 6]
        else:
            parent[key] = copy.deepcopy(JUNK[junk])
    return tree
