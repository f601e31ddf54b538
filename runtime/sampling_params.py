"""`infc.runtime.sampling.sampling_params` under its earlier name, for scripts written with it."""

from .sampling.sampling_params import SamplingParams, ignored_recommendations

__all__ = ["SamplingParams", "ignored_recommendations"]
