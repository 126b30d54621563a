"""Machinery that knows nothing of preference training: errors, processes, durable files, remote folders, plots.

Imports nothing of the project.
"""
