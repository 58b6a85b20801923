"""Retrieval: features of a data set or a folder, some kept; searches, rankings, scores, pictures."""
