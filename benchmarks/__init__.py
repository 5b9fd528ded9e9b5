"""Measurements of record: each script writes one CSV under results/, and report.py turns it into a table of docs/."""
