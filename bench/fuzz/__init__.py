"""Files, models and estimators under drawn and mutated input; see ``python -m bench.fuzz --help``."""
