"""Benchmarks: each figure stands beside the same work done with the ordinary tools in the same run."""
