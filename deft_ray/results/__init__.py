"""What ended trials are worth: records, fronts, hypervolume, plots and the report."""
