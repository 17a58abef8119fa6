"""L7: what the paper compares MeZO with, and its tables: baselines, sweeps, reports. Needs ``forwardtune[paper]``."""
