"""The literature's experiments, one short script each; ``python -m bench.papers`` runs them."""
