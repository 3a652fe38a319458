"""Metrics as `evaluate.Metric` classes that live in the package, so that nothing is fetched to compute them."""

from llmcore_hf.metrics.calibration import Calibration
from llmcore_hf.metrics.exact_match import ExactMatch
from llmcore_hf.metrics.perplexity import Perplexity
from llmcore_hf.metrics.preference import Preference

__all__ = ["Calibration", "ExactMatch", "Perplexity", "Preference"]
