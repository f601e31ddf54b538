"""Tests of the C++ kernels, built for several targets and compared with numpy in float64."""
