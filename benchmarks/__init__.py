"""Measurements of record: each script writes one CSV under results/, and report.py turns it into a table of docs/."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
