"""Differential privacy: where its randomness comes from, what it costs, and who keeps the account."""
