"""Codecs of federated updates."""
