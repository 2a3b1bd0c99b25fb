"""Random access to samples of many formats: `open.open_source` gives a `record.Source`; see docs/data.md.

Nothing in a data file is executed, nothing is fetched from a network, and no path leaves the data root. Every
refusal has one of the codes of `reasons.REASONS`. Free of torch, so that index processes start quickly.
"""
