"""Callbacks for the trainers of other packages, each imported with its module: ``smoothk.integrations.lightning``."""
