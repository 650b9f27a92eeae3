"""Metrics that are exact over clients: sums that add up, and the numbers that follow from them."""
