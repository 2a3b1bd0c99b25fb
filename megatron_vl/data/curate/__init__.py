"""Curation: which samples of a data set are kept, and why the others are not. Used by tools/prepare_data.py."""
