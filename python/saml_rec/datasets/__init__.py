"""Data sets to try things on, each a table and its schema."""
