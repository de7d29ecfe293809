"""What a run says: records, their writers, the console, warnings, speed and traces."""
