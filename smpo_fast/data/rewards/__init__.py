"""Reward models and the scores they give: scorers by name, published weights, and the table of scores."""
