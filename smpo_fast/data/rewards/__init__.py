"""Reward models, and the table of the scores that they give to a pair table's images.

``load_scorer`` (scorers.py) gives a reward model by name, from published weights or a user's function; ``score``
(scoring.py) writes a folder of scores, which ``ScoreTable`` (score_table.py) reads. It reads pair tables (data.pairs)
and decodes images (data), and knows nothing of the cache or of training.
"""
