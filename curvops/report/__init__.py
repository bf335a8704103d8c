"""The curvature report behind `python -m curvops report`: train or load, measure, check against dense, write."""
