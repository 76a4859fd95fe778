"""Serving logic without HTTP frameworks: batching, prediction, authentication."""
