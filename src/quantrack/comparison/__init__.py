"""What runs say side by side: groups that may be compared, tables, plots, the report, promotion gates."""
