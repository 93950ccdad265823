"""All results as one HTML page that opens from disk."""
