"""Stand-ins for other projects' networks: their parameter names and formulas, at small widths, in our own words."""
