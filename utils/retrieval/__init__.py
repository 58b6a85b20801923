"""Retrieval: features of a data set or folder, some kept; searches, rankings, scores, pictures."""
