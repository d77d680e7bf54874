"""The MLflow mirror of a sweep: rebuilt from the records at any time, never needed by the sweep."""
