"""The words that every room agrees on: modes, statuses, configuration, requests, results, errors.

This room imports nothing of nbinfer but itself, and no engine, frame library or widget.
"""
