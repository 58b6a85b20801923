"""Retrieval: features of a whole data set, rankings and tables of scores."""
